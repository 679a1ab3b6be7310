"""The statement filter: what would end the lent transaction is recognised, and nothing else."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from idemq.guard import ends_transaction

EVERYWHERE = ["postgresql", "mysql", "mariadb", "sqlite"]
MYSQL = ["mysql", "mariadb"]

ENDING: list[tuple[list[str], str]] = [
    *[
        (EVERYWHERE, sql)
        for sql in (
            "COMMIT",
            "commit;",
            "  \n\tCommit work",
            "COMMIT AND CHAIN",
            "ROLLBACK",
            "rollback work",
            "ROLLBACK TRANSACTION",
            "BEGIN",
            "BEGIN IMMEDIATE",
            "START TRANSACTION READ ONLY",
            "END",
            "/* why */ COMMIT",
            "-- why\nCOMMIT",
            "/* it's */ -- isn't\n commit",
            "INSERT INTO t VALUES (1); COMMIT",
            "INSERT INTO t VALUES (';'); -- ;\n /* ; */ commit; SELECT 1",
            "SAVEPOINT a; ROLLBACK TO a; ROLLBACK",
            "ROLLBACK /* not to */ ; SELECT 'to a'",
        )
    ],
    *[
        (["postgresql"], sql)
        for sql in (
            "ABORT",
            "PREPARE TRANSACTION 'x'",
            "COMMIT PREPARED 'x'",
            "/* a /* nested */ b */ COMMIT",
            "SELECT E'it\\'s'; COMMIT",
            "SELECT $q$ it's $q$; COMMIT",
            r"SELECT '\'; COMMIT --'",
            "CREATE FUNCTION f() RETURNS int BEGIN ATOMIC SELECT 1; SELECT 2; END; COMMIT",
        )
    ],
    *[
        (MYSQL, sql)
        for sql in (
            "SET STATEMENT max_statement_time = 1 FOR TRUNCATE t",
            "set statement a = 1 for set statement b = 2 for ALTER TABLE t ADD n int",
            "SET autocommit=1",
            "SET @@autocommit := 1",
            "SET SESSION autocommit = ON",
            "set names utf8mb4, @@session . autocommit=1",
            "# why\nCOMMIT",
            "/*!40000 COMMIT */",
            "/*M!100100 COMMIT */",
            "/* /* */ COMMIT",
            "CREATE TABLE t (n int)",
            "CREATE OR REPLACE TABLE t (n int)",
            "DROP TABLE t",
            "ALTER TABLE t ADD n int",
            "RENAME TABLE a TO b",
            "TRUNCATE t",
            "LOCK TABLES t WRITE",
            "UNLOCK TABLES",
            "CALL p()",
            "ANALYZE TABLE t",
            "ANALYZE LOCAL TABLE t",
            "GRANT SELECT ON t TO u",
            "XA START 'x'",
            "PREPARE s FROM 'COMMIT'",
            "EXECUTE IMMEDIATE 'COMMIT'",
            r"SELECT 'it\'s'; COMMIT",
        )
    ],
    (["sqlite"], "/* /* */ COMMIT"),
    (["sqlite"], "END TRANSACTION"),
    (["sqlite"], "CREATE TRIGGER g AFTER INSERT ON t BEGIN DELETE FROM u; END; COMMIT"),
]

HARMLESS: list[tuple[list[str], str]] = [
    *[
        (EVERYWHERE, sql)
        for sql in (
            "",
            ";",
            "SELECT 1",
            "SELECT '; commit'",
            "SELECT 'it''s; commit'",
            "INSERT INTO commits (begin_at) VALUES ('; rollback')",
            "UPDATE rollback_log SET n = 1 -- ; commit",
            "SELECT 1 /* ; commit */",
            "/* commit */ SELECT 1",
            "-- commit\nSELECT 1",
            "SELECT CASE WHEN n = 1\nTHEN 2\nEND FROM t",
            "SAVEPOINT a",
            "RELEASE SAVEPOINT a",
            "ROLLBACK TO a",
            "ROLLBACK TO SAVEPOINT a",
            "rollback transaction to savepoint a",
            "ROLLBACK /* ; */ TO a",
            "WITH ended AS (SELECT 1) SELECT * FROM ended",
            "SELECT n FROM t FOR UPDATE",
        )
    ],
    *[
        (["postgresql"], sql)
        for sql in (
            "SELECT $$; commit$$",
            "SELECT $q$; commit $$ $q$",
            "DO $$ BEGIN PERFORM 1; END $$",
            "CREATE FUNCTION f() RETURNS void LANGUAGE plpgsql AS $$ BEGIN PERFORM 1; END; $$",
            "CREATE FUNCTION f() RETURNS int BEGIN ATOMIC SELECT 1; SELECT 2; END",
            "CREATE OR REPLACE PROCEDURE p() BEGIN ATOMIC INSERT INTO t VALUES (1); END",
            "SELECT E'\\'; commit'",
            "/* a /* nested */ commit */ SELECT 1",
            "SELECT 1 /* a /* b ; */ ; commit */",
            'SELECT "; commit" FROM t',
            "CREATE TABLE t (n int)",
            "TRUNCATE t",
            "ALTER TABLE t ADD n int",
            "LOCK TABLE t IN EXCLUSIVE MODE",
            "CALL p()",
            "PREPARE s AS SELECT 1",
            "EXECUTE s",
            "SET LOCAL statement_timeout = 100",
            "SET CONSTRAINTS ALL IMMEDIATE",
            "ANALYZE t",
            "COPY t FROM STDIN",
        )
    ],
    *[
        (MYSQL, sql)
        for sql in (
            "SELECT '\\'; commit'",
            'SELECT "it\\"s; commit"',
            "SELECT `; commit` FROM t",
            "SELECT 1 # ; commit",
            "SELECT 1--1; SELECT 2",
            "CREATE TEMPORARY TABLE t (n int)",
            "CREATE OR REPLACE TEMPORARY TABLE t (n int)",
            "DROP TEMPORARY TABLE t",
            "INSERT INTO t VALUES (1) ON DUPLICATE KEY UPDATE n = 2",
            "REPLACE INTO t VALUES (1)",
            "LOAD DATA LOCAL INFILE 'f' INTO TABLE t",
            "ANALYZE FORMAT=JSON SELECT 1",
            "SET @n = 1",
            "SET STATEMENT max_statement_time = 1 FOR UPDATE t SET n = 1",
            "SET @autocommit = 1",
            "SET SESSION innodb_lock_wait_timeout = 2",
            "SELECT @@autocommit",
            "CHECKSUM TABLE t",
            "/*!40001 SQL_NO_CACHE */ SELECT 1",
        )
    ],
    *[
        (["sqlite"], sql)
        for sql in (
            "SELECT [; commit] FROM t",
            "SELECT `; commit` FROM t",
            "CREATE TRIGGER g AFTER INSERT ON t BEGIN DELETE FROM u; DELETE FROM v; END",
            "CREATE TEMP TRIGGER g AFTER INSERT ON t BEGIN SELECT CASE WHEN 1 THEN 2 END; END;",
            "CREATE TABLE t (n int)",
            "INSERT OR REPLACE INTO t VALUES (1)",
            "PRAGMA user_version",
        )
    ],
]


def cases(table: list[tuple[list[str], str]]) -> list[tuple[str, str]]:
    return [(kind, sql) for kinds, sql in table for kind in kinds]


@pytest.mark.hazard("H3")
@pytest.mark.parametrize(("kind", "sql"), cases(ENDING))
def test_a_text_that_ends_the_transaction_is_recognised(kind: str, sql: str) -> None:
    assert ends_transaction(sql, kind)


@pytest.mark.parametrize(("kind", "sql"), cases(HARMLESS))
def test_an_ordinary_text_passes(kind: str, sql: str) -> None:
    assert not ends_transaction(sql, kind)


_WORDS = st.text(st.sampled_from(";/*-# \nabctimo'"), max_size=30).map(lambda text: f"; commit {text}")


@given(_WORDS, st.sampled_from(EVERYWHERE))
def test_whatever_stands_in_a_string_passes(words: str, kind: str) -> None:
    quoted = words.replace("'", "''")
    assert not ends_transaction(f"INSERT INTO t VALUES (1, '{quoted}') ", kind)


@pytest.mark.hazard("H3")
@given(_WORDS, st.sampled_from(EVERYWHERE))
def test_whatever_stands_in_a_string_hides_no_commit_after_it(words: str, kind: str) -> None:
    quoted = words.replace("'", "''")
    assert ends_transaction(f"INSERT INTO t VALUES (1, '{quoted}') ; COMMIT", kind)


@pytest.mark.hazard("H3")
@given(
    st.text(max_size=40).filter(lambda text: "*/" not in text and "/*" not in text),
    st.sampled_from(EVERYWHERE),
)
def test_whatever_stands_in_a_comment_hides_no_commit_after_it(words: str, kind: str) -> None:
    assert ends_transaction(f"/* {words} */ COMMIT", kind)


@pytest.mark.parametrize("kind", EVERYWHERE)
def test_a_long_definition_takes_time_in_proportion_to_its_length(kind: str) -> None:
    began = time.process_time()
    ends_transaction("CREATE " + "TRIGGER BEGINNING " * 8000, kind)
    assert time.process_time() - began < 2  # it is milliseconds; in proportion to the square, half a minute
