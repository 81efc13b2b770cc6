//! The statements of the conversations: whatever they do, two servers with equal contents answer
//! them with equal bytes. No clocks, no process ids, no OIDs of new relations, and an order for rows.

use crate::sim::rng::Rng;

/// Makes the contents of a database; run once in the template.
pub(super) const SCHEMA: &str = "
CREATE TABLE t (id integer PRIMARY KEY, v text, n numeric NOT NULL DEFAULT 1.5);
INSERT INTO t SELECT i, 'row ' || i FROM generate_series(1, 20) AS i;
CREATE TABLE s (id serial PRIMARY KEY, v text CHECK (v <> 'forbidden'));
CREATE TABLE c (a integer, b text);
CREATE FUNCTION noisy(i integer) RETURNS integer LANGUAGE plpgsql AS $$
  BEGIN RAISE NOTICE 'notice %', i; RAISE WARNING 'warning %', i; RAISE INFO 'info'; RETURN i; END $$;
CREATE FUNCTION fails(m text) RETURNS integer LANGUAGE plpgsql AS $$
  BEGIN RAISE EXCEPTION '%', m USING ERRCODE = 'KX123', DETAIL = 'why', HINT = 'do not'; END $$;
CREATE FUNCTION sets(w text) RETURNS text LANGUAGE sql AS $$
  SELECT set_config('search_path', w, false) $$;
CREATE PROCEDURE commits(i integer) LANGUAGE plpgsql AS $$
  BEGIN INSERT INTO s (v) VALUES ('p'); COMMIT; INSERT INTO s (v) VALUES ('q'); ROLLBACK; END $$;
GRANT ALL ON ALL TABLES IN SCHEMA public TO app;
GRANT ALL ON ALL SEQUENCES IN SCHEMA public TO app;
GRANT ALL ON SCHEMA public TO app;
";

/// Brings the contents back to what [`SCHEMA`] made.
pub(super) const RESTORE: &str = "
TRUNCATE t, s, c RESTART IDENTITY;
INSERT INTO t SELECT i, 'row ' || i FROM generate_series(1, 20) AS i;
";

/// Any statement but those that begin or end a COPY or a transaction.
pub(super) fn any(rng: &Rng) -> String {
    match rng.below(40) {
        0..=9 => reads(rng),
        10..=17 => writes(rng),
        18..=23 => fails(rng),
        24..=31 => settings(rng),
        32 | 33 => notify(rng),
        34 | 35 => format!("SELECT noisy({})", rng.below(5)),
        36..=38 => session(rng),
        _ => large(rng),
    }
}

/// Rows.
pub(super) fn reads(rng: &Rng) -> String {
    let n = rng.below(25);
    match rng.below(8) {
        0 => format!("SELECT id, v, n FROM t WHERE id = {n}"),
        1 => format!("SELECT * FROM t WHERE id < {n} ORDER BY id"),
        2 => format!("SELECT {n} AS \"a;b\", 'it''s', NULL::text, true"),
        3 => format!("VALUES ({n}), (2), (3)"),
        4 => "SELECT FROM t WHERE id = 1".to_owned(),
        5 => format!("WITH w AS (SELECT id FROM t) SELECT count(*), {n} FROM w"),
        6 => format!("/* a comment; /* nested */ */ SELECT $q$;{n}$q$ -- end"),
        _ => "SELECT a, b FROM c ORDER BY a, b".to_owned(),
    }
}

fn writes(rng: &Rng) -> String {
    let n = rng.below(30);
    match rng.below(6) {
        0 => format!("INSERT INTO s (v) VALUES ('v{n}') RETURNING id, v"),
        1 => format!("UPDATE t SET v = 'u{n}' WHERE id = {n}"),
        2 => format!("DELETE FROM t WHERE id = {n} RETURNING id"),
        3 => format!("INSERT INTO t (id, v) VALUES ({n}, 'again') ON CONFLICT DO NOTHING"),
        4 => "TRUNCATE c".to_owned(),
        _ => format!("INSERT INTO t (id) VALUES ({n})"),
    }
}

/// Mostly errors.
pub(super) fn fails(rng: &Rng) -> String {
    let n = rng.below(10);
    match rng.below(9) {
        0 => "SELECT 1/0".to_owned(),
        1 => "SELEC 1".to_owned(),
        2 => format!("SELECT fails('m{n}')"),
        3 => "INSERT INTO s (v) VALUES ('forbidden')".to_owned(),
        4 => format!("SELECT nowhere FROM t WHERE id = {n}"),
        5 => "DROP TABLE nothing".to_owned(),
        6 => "DROP TABLE IF EXISTS nothing".to_owned(),
        7 => "SET statement_timeout = 'soon'".to_owned(),
        _ => "SELECT 'unterminated".to_owned(),
    }
}

/// Parameters, reported ones among them.
pub(super) fn settings(rng: &Rng) -> String {
    let n = rng.below(4);
    match rng.below(14) {
        0 => format!("SET application_name = 'name {n}'"),
        1 => format!("SET TimeZone TO '{}'", ["UTC", "Europe/Berlin", "Asia/Tokyo", "+02"][n]),
        2 => format!("SET DateStyle = '{}'", ["ISO, DMY", "German", "SQL, MDY", "ISO"][n]),
        3 => format!("SET LOCAL work_mem = '{}MB'", n + 1),
        4 => format!("SET work_mem = '{}MB'", n + 1),
        5 => "SHOW work_mem".to_owned(),
        6 => "RESET ALL".to_owned(),
        7 => "RESET application_name".to_owned(),
        8 => {
            format!("SET search_path TO {}", ["public", "pg_catalog, public", "\"$user\"", "''"][n])
        }
        9 => format!("SELECT set_config('kornak.x', 'v{n}', {})", n < 2),
        10 => "SET ROLE other".to_owned(),
        11 => "RESET ROLE".to_owned(),
        12 => "SELECT sets('public')".to_owned(),
        _ => format!("SET default_transaction_read_only = {}", n == 0),
    }
}

fn notify(rng: &Rng) -> String {
    let n = rng.below(3);
    match rng.below(5) {
        0 | 1 => format!("LISTEN ch{n}"),
        2 => format!("NOTIFY ch{n}, 'payload {}'", rng.below(100)),
        3 => format!("SELECT pg_notify('ch{n}', 'from a function')"),
        _ => ["UNLISTEN *", "UNLISTEN ch0", "UNLISTEN ch1"][n].to_owned(),
    }
}

fn session(rng: &Rng) -> String {
    let n = rng.below(3);
    match rng.below(11) {
        0 => "CREATE TEMP TABLE IF NOT EXISTS tmp (a integer)".to_owned(),
        1 => format!("INSERT INTO tmp VALUES ({n})"),
        2 => "SELECT a + 0 FROM tmp ORDER BY a".to_owned(),
        3 => format!("PREPARE sql{n} (integer) AS SELECT $1 + {n}"),
        4 => format!("EXECUTE sql{n} (4)"),
        5 => format!("DEALLOCATE sql{n}"),
        6 => ["DISCARD ALL", "DISCARD PLANS", "DEALLOCATE ALL"][n].to_owned(),
        7 => format!("DECLARE cur{n} CURSOR WITH HOLD FOR SELECT id FROM t ORDER BY id"),
        8 => format!("FETCH 2 FROM cur{n}"),
        9 => "CLOSE ALL".to_owned(),
        _ => format!("SELECT pg_try_advisory_lock({n}), pg_advisory_unlock_all()"),
    }
}

/// Answers that do not fit into one read.
fn large(rng: &Rng) -> String {
    let n = 1 << rng.below(18);
    match rng.below(4) {
        0 => format!("SELECT repeat('x', {n})"),
        1 => format!("SELECT i, repeat('y', 100) FROM generate_series(1, {}) AS i", n / 256),
        2 => format!("SELECT length('{}')", "z".repeat(n / 4)),
        _ => format!("DO $$ BEGIN RAISE NOTICE '%', repeat('n', {}); END $$", n / 16),
    }
}

/// Begins, ends and goes back.
pub(super) fn transaction(rng: &Rng) -> String {
    const ALL: [&str; 18] = [
        "BEGIN",
        "BEGIN",
        "START TRANSACTION ISOLATION LEVEL REPEATABLE READ",
        "BEGIN READ ONLY",
        "COMMIT",
        "END",
        "COMMIT AND CHAIN",
        "ROLLBACK",
        "ABORT",
        "ROLLBACK AND CHAIN",
        "SAVEPOINT a",
        "ROLLBACK TO a",
        "RELEASE a",
        "SAVEPOINT b",
        "ROLLBACK TO SAVEPOINT b",
        "CALL commits(1)",
        "SET TRANSACTION READ ONLY",
        "SET CONSTRAINTS ALL DEFERRED",
    ];
    ALL[rng.below(ALL.len())].to_owned()
}

/// A COPY: towards the server or from it.
pub(super) fn copy(rng: &Rng, is_in: bool) -> String {
    match (is_in, rng.below(6)) {
        (true, 0..=3) => "COPY c FROM STDIN".to_owned(),
        (true, 4) => "COPY c (a) FROM STDIN WITH (FORMAT csv)".to_owned(),
        (true, _) => "COPY nowhere FROM STDIN".to_owned(),
        (false, 0..=2) => "COPY (SELECT id, v FROM t ORDER BY id) TO STDOUT".to_owned(),
        (false, 3) => "COPY (SELECT 1/(3-i) FROM generate_series(1, 5) i) TO STDOUT".to_owned(),
        (false, 4) => {
            "COPY (SELECT id, n FROM t ORDER BY id) TO STDOUT WITH (FORMAT binary)".to_owned()
        }
        (false, _) => {
            format!(
                "COPY (SELECT repeat('c', 3000) FROM generate_series(1, {})) TO STDOUT",
                rng.below(60)
            )
        }
    }
}

/// One line of COPY data, now and then one that is not.
pub(super) fn copy_line(rng: &Rng) -> String {
    match rng.below(30) {
        0 => "not a number\tx\n".to_owned(),
        1 => "\\.\n".to_owned(),
        2 => format!("{}\t{}\n", rng.below(9), "w".repeat(1 << rng.below(16))),
        n => format!("{n}\ttext {n}\n"),
    }
}
