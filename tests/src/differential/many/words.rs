//! The statements of many clients at once. Names of what a session holds (settings, statements, temporary tables,
//! cursors) are the same for all of them, so that whatever leaks is met; what a database holds is each
//! client's own, or only read, so that nobody's answers hang on how fast others are.
//!
//! Not here, because a pool shows it by nature (docs/pooling.md): process ids, `currval`, seeds, and
//! `pg_prepared_statements` of the protocol.

use crate::sim::rng::Rng;

/// Whose words these are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Speaker {
    /// Tables are this client's, whoever it is connected as.
    pub slot: usize,
    /// Locks and channels are this session's.
    pub session: usize,
    /// May change what is in the database: not who leaves in the middle, for nobody knows how far that came.
    pub writes: bool,
}

/// Makes the contents of a database, with tables for so many clients.
pub(super) fn schema(clients: usize) -> String {
    use std::fmt::Write as _;
    let mut text = "
CREATE SCHEMA alt;
CREATE TABLE t (id integer PRIMARY KEY, v text);
INSERT INTO t SELECT i, 'row ' || i FROM generate_series(1, 20) AS i;
CREATE TABLE times (id integer, at timestamptz);
INSERT INTO times SELECT i, timestamptz '2024-01-01 00:00Z' + i * interval '1 hour' FROM generate_series(-12, 12) i;
CREATE TABLE public.which (w text);
CREATE TABLE alt.which (w text);
INSERT INTO public.which VALUES ('public');
INSERT INTO alt.which VALUES ('alt');
CREATE TABLE shared (id integer, v text);
INSERT INTO shared VALUES (1, 'one'), (2, 'two');
CREATE FUNCTION sets_tenant(who text) RETURNS text LANGUAGE sql AS $$ SELECT set_config('my.tenant', who, false) $$;
CREATE FUNCTION sets_hidden(a text, v text) RETURNS void LANGUAGE plpgsql AS $$ BEGIN PERFORM set_config('my.' || a, v, false); END $$;
CREATE FUNCTION sets_path(w text) RETURNS void LANGUAGE plpgsql AS $$ BEGIN PERFORM set_config('search_path', w, false); END $$;
CREATE FUNCTION takes_lock(k integer) RETURNS void LANGUAGE plpgsql AS $$ BEGIN PERFORM pg_advisory_lock(k); END $$;
CREATE FUNCTION makes_temp() RETURNS void LANGUAGE plpgsql AS $$ BEGIN CREATE TEMP TABLE IF NOT EXISTS tmp (a integer); END $$;
CREATE FUNCTION listens(c text) RETURNS void LANGUAGE plpgsql AS $$ BEGIN EXECUTE 'LISTEN ' || c; END $$;
CREATE FUNCTION prepares() RETURNS void LANGUAGE plpgsql AS $$ BEGIN EXECUTE 'PREPARE p2 AS SELECT 22'; END $$;
CREATE PROCEDURE sets_memory(w text) LANGUAGE plpgsql AS $$ BEGIN PERFORM set_config('work_mem', w, false); COMMIT; END $$;
GRANT USAGE ON SCHEMA alt TO PUBLIC;
"
    .to_owned();
    for slot in 0..clients {
        let _ =
            writeln!(text, "CREATE TABLE own{slot} (id serial, v text CHECK (v <> 'forbidden'));");
        let _ = writeln!(text, "ALTER TABLE own{slot} OWNER TO app;");
    }
    text + "GRANT ALL ON ALL TABLES IN SCHEMA public, alt TO app, one, two;
GRANT ALL ON ALL SEQUENCES IN SCHEMA public TO app, one, two;"
}

/// Brings rows back to what [`schema`] made.
pub(super) fn restore(clients: usize) -> String {
    let own: Vec<_> = (0..clients).map(|slot| format!("own{slot}")).collect();
    format!(
        "TRUNCATE {} RESTART IDENTITY; ALTER TABLE shared DROP COLUMN IF EXISTS more; DROP INDEX IF EXISTS by_id",
        own.join(", ")
    )
}

/// Changes that somebody else makes to tables that all read.
pub(super) const CHANGES: &[&str] = &[
    "ALTER TABLE shared ADD COLUMN IF NOT EXISTS more integer DEFAULT 7",
    "ALTER TABLE shared DROP COLUMN IF EXISTS more",
    "CREATE INDEX IF NOT EXISTS by_id ON shared (id)",
    "DROP INDEX IF EXISTS by_id",
    "ANALYZE shared",
    "BEGIN; DROP TABLE shared; CREATE TABLE shared (id integer, v text); \
     INSERT INTO shared VALUES (1, 'one'), (2, 'two'); GRANT ALL ON shared TO app, one, two; COMMIT",
    "CREATE OR REPLACE FUNCTION takes_lock(k integer) RETURNS void LANGUAGE plpgsql \
     AS $$ BEGIN PERFORM pg_advisory_lock(k); END $$",
];

/// Everything that a session may see of itself, in one row: who it is, its parameters, statements of SQL,
/// temporary tables, cursors, locks and channels. In one batch with a RESET a pool's `application_name` is the
/// server's instead of that of the login (docs/pooling.md): what the client is told of it is compared, not what a query finds.
const LOOK: &str = "SELECT current_user, session_user, \
    coalesce(current_setting('my.tenant', true), ''), coalesce(current_setting('my.other', true), ''), \
    (SELECT string_agg(concat(name, '=', setting, '/', CASE name WHEN 'application_name' THEN '' ELSE reset_val END), ', ' \
        ORDER BY name) FROM pg_settings WHERE context IN ('user', 'superuser') \
        AND (setting IS DISTINCT FROM boot_val OR reset_val IS DISTINCT FROM boot_val) \
        AND NOT (name = 'application_name' AND setting IN ('', 'first''s \\ name'))), \
    (SELECT string_agg(concat(name, ': ', statement), ', ' ORDER BY name) FROM pg_prepared_statements WHERE from_sql), \
    (SELECT string_agg(relname, ', ' ORDER BY relname) FROM pg_class WHERE relnamespace = pg_my_temp_schema()), \
    (SELECT string_agg(concat(name, is_holdable), ', ' ORDER BY name) FROM pg_cursors WHERE name <> ''), \
    (SELECT string_agg(concat(classid, '.', objid, mode), ', ' ORDER BY objid, mode) FROM pg_locks \
        WHERE locktype = 'advisory' AND pid = pg_backend_pid()), \
    (SELECT string_agg(c, ', ' ORDER BY c) FROM pg_listening_channels() AS c)";

/// As [`LOOK`], with the parameter that only the first client sets ([`hidden`]), for the others.
pub(super) fn look(who: Speaker) -> String {
    match who.slot {
        0 => LOOK.to_owned(),
        _ => format!("{LOOK}, coalesce(current_setting('my.hidden', true), '')"),
    }
}

/// A first statement: client 0 hides something, the others look.
pub(super) fn first(rng: &Rng, who: Speaker) -> String {
    match who.slot {
        0 => hidden(rng, who),
        _ => look(who),
    }
}

/// Brings a session back to where it keeps its connection from nobody. What it has set and prepared stays.
pub(super) const LET_GO: &[&str] = &[
    "RESET SESSION AUTHORIZATION",
    "RESET ROLE",
    "CLOSE ALL",
    "UNLISTEN *",
    "SELECT pg_advisory_unlock_all()",
    "DISCARD TEMP",
    // Those of SQL keep a connection, and there is no word for them alone.
    "DEALLOCATE p0",
    "DEALLOCATE p1",
    "DEALLOCATE p2",
];

/// Parameters and values for them, as they are written in a statement.
const PARAMETERS: &[(&str, &[&str])] = &[
    ("work_mem", &["'5MB'", "'6MB'", "'7MB'"]),
    ("search_path", &["alt, public", "public", "public, alt"]),
    ("TimeZone", &["'UTC'", "'Asia/Tokyo'", "'America/New_York'"]),
    ("DateStyle", &["'ISO, DMY'", "'German'", "'SQL, MDY'"]),
    ("application_name", &["'name 1'", "'name 2'"]),
    ("statement_timeout", &["0", "'60s'", "90000"]),
    ("extra_float_digits", &["0", "2"]),
    ("bytea_output", &["'hex'", "'escape'"]),
    ("IntervalStyle", &["'postgres'", "'iso_8601'"]),
    ("enable_seqscan", &["on", "off"]),
    ("my.tenant", &["'a'", "'b'", "'c'"]),
    ("my.other", &["'x'", "'y'"]),
    ("client_encoding", &["'UTF8'", "'LATIN1'"]),
    ("default_transaction_isolation", &["'repeatable read'", "'read committed'"]),
];

fn pick<'a>(rng: &Rng, list: &[&'a str]) -> &'a str {
    list[rng.below(list.len())]
}

/// Something is set or reset, in one of the many ways in which that can be said.
pub(super) fn sets(rng: &Rng) -> String {
    let (name, values) = PARAMETERS[rng.below(PARAMETERS.len())];
    let value = pick(rng, values);
    let literal = match value.starts_with('\'') {
        true => value.to_owned(),
        false => format!("'{value}'"),
    };
    match rng.below(34) {
        0..=3 => format!("SET {name} = {value}"),
        4 => format!("SET SESSION {name} TO {value}"),
        5 => format!("/* app:Rails */ SET {name} = {value}"),
        6 => format!("-- why\nset\t{name} to {value} ;"),
        7 => format!("SET {name} = {value}; SELECT 1"),
        8 => format!("SELECT 1; SET {name} TO {value}; SELECT 2"),
        9 | 10 => format!("SET LOCAL {name} = {value}"),
        11 | 12 => format!("RESET {name}"),
        13 => format!("RESET {name} /* app:Rails */"),
        14 => format!("SET {name} TO DEFAULT"),
        15 => "RESET ALL".to_owned(),
        16 => format!("SELECT set_config('{name}', {literal}, false)"),
        17 => format!("SELECT set_config('{name}', {literal}, true)"),
        18 => format!("DO $$ BEGIN SET {name} = {value}; END $$"),
        19 => format!("DO $$ BEGIN PERFORM set_config('{name}', {literal}, false); END $$"),
        20 => format!("UPDATE pg_settings SET setting = {literal} WHERE name = '{name}'"),
        21 => format!("SELECT sets_tenant({})", pick(rng, &["'a'", "'b'"])),
        22 => format!("SELECT sets_path('{}')", pick(rng, &["alt, public", "public"])),
        23 => format!("CALL sets_memory('{}')", pick(rng, &["8MB", "9MB"])),
        24 => format!("SET TIME ZONE {}", pick(rng, &["'Asia/Tokyo'", "'UTC'", "-3", "LOCAL"])),
        25 => "RESET TIME ZONE".to_owned(),
        26 => format!("SET NAMES {}", pick(rng, &["'LATIN1'", "'UTF8'", "DEFAULT"])),
        27 => characteristics(rng),
        28 => format!(
            "SET {} = {}",
            pick(rng, &["my . tenant", "\"my\".\"tenant\"", "MY.Tenant"]),
            pick(rng, &["'d'", "'e'"])
        ),
        29 => format!("SET SCHEMA {}", pick(rng, &["'alt'", "'public'"])),
        30 => "SET work_mem FROM CURRENT".to_owned(),
        31 => format!("BEGIN; SET {name} = {value}; {}", pick(rng, &["COMMIT", "ROLLBACK"])),
        32 => format!(
            "SET {name} = {value}; {}",
            pick(rng, &["SELECT 1/0", "ROLLBACK", "RESET work_mem"])
        ),
        _ => format!("SET {name} = 'no such value'"),
    }
}

fn characteristics(rng: &Rng) -> String {
    let modes = [
        "ISOLATION LEVEL SERIALIZABLE",
        "ISOLATION LEVEL READ COMMITTED",
        "DEFERRABLE",
        "NOT DEFERRABLE",
    ];
    format!("SET SESSION CHARACTERISTICS AS TRANSACTION {}", pick(rng, &modes))
}

/// As [`sets`], in the plain way.
pub(super) fn sets_plainly(rng: &Rng) -> String {
    let (name, values) = PARAMETERS[rng.below(PARAMETERS.len())];
    match rng.below(8) {
        0 => format!("RESET {name}"),
        2 | 3 => characteristics(rng),
        1 => format!("SET LOCAL {name} = {}", pick(rng, values)),
        _ => format!("SET {name} = {}", pick(rng, values)),
    }
}

/// A parameter that functions set under a name which no text shows: its own client may lose it over a pool
/// (docs/pooling.md), so it only sets it, and the others look.
fn hidden(rng: &Rng, who: Speaker) -> String {
    match who.slot {
        0 => format!("SELECT sets_hidden('hidden', '{}')", pick(rng, &["h", "i"])),
        _ => "SELECT coalesce(current_setting('my.hidden', true), '')".to_owned(),
    }
}

/// The roles of the clients.
pub(super) fn roles(rng: &Rng) -> &'static str {
    const ALL: &[&str] = &[
        "SET ROLE one",
        "SET ROLE 'two'",
        "SET LOCAL ROLE one",
        "RESET ROLE",
        "SET ROLE NONE",
        "SET SESSION AUTHORIZATION one",
        "SET LOCAL SESSION AUTHORIZATION two",
        "SET SESSION AUTHORIZATION DEFAULT",
        "RESET SESSION AUTHORIZATION",
        "SELECT set_config('role', 'two', false)",
        "DO $$ BEGIN SET ROLE one; END $$",
    ];
    ALL[rng.below(ALL.len())]
}

/// Questions whose answers hang on what the session has set and holds.
pub(super) fn reads(rng: &Rng) -> String {
    let n = rng.below(22);
    match rng.below(15) {
        0 => format!("SELECT id, v FROM t WHERE id = {n}"),
        1 => "SELECT w FROM which ORDER BY w".to_owned(),
        2 => "SELECT count(*) FROM times WHERE at > '2024-01-01 03:00'".to_owned(),
        3 => "SELECT '01/02/2024'::date::text, '1 2:3'::interval::text".to_owned(),
        4 => format!("SELECT v, {n} FROM shared WHERE id = 1"),
        5 => "SELECT current_user, session_user, current_setting('is_superuser')".to_owned(),
        6 => match PARAMETERS[rng.below(10)].0 {
            // As in LOOK.
            "application_name" => {
                r"SELECT replace(current_setting('application_name'), 'first''s \ name', '')".to_owned()
            }
            name => format!("SHOW {name}"),
        },
        7 => "SHOW transaction_isolation".to_owned(),
        8 => "SELECT coalesce(current_setting('my.tenant', true), ''), coalesce(current_setting('my.other', true), '')".to_owned(),
        9 => "SELECT 0.1::float8 + 0.2, '\\x01ff'::bytea".to_owned(),
        10 => "SELECT name, statement FROM pg_prepared_statements WHERE from_sql ORDER BY name".to_owned(),
        11 => format!("SELECT repeat('x', {})", 1 << rng.below(16)),
        12 => "SELECT max(id) FROM t -- SET my.tenant = 'z'".to_owned(),
        13 => "SELECT 'a;b', $$SET ROLE one$$".to_owned(),
        _ => "SELECT a + 0 FROM tmp ORDER BY a".to_owned(),
    }
}

pub(super) fn fails(rng: &Rng) -> String {
    match rng.below(6) {
        0 => "SELECT 1/0".to_owned(),
        1 => "SELEC 1".to_owned(),
        2 => "SELECT nowhere FROM t".to_owned(),
        3 => format!("DEALLOCATE {}", pick(rng, &["nobody", "\"_kornak:1\""]))
            .replace("\"_kornak:1\"", "s3"),
        4 => "SET work_mem = 'much'".to_owned(),
        _ => "SELECT 'unterminated".to_owned(),
    }
}

/// Something that a session holds.
pub(super) fn holds(rng: &Rng, who: Speaker) -> String {
    let (key, n) = (1000 + who.session, rng.below(3));
    match rng.below(36) {
        0 | 1 => "CREATE TEMP TABLE IF NOT EXISTS tmp (a integer)".to_owned(),
        2 => "CREATE TEMP TABLE tmp (a integer) ON COMMIT DROP".to_owned(),
        3 => format!("INSERT INTO tmp VALUES ({n})"),
        4 => "DROP TABLE IF EXISTS tmp".to_owned(),
        5 => "SELECT 1 AS a INTO TEMP tmp".to_owned(),
        6 => "SELECT makes_temp()".to_owned(),
        7 => "CREATE TEMP TABLE which (w text)".to_owned(),
        8 | 9 => format!("PREPARE p{n} AS SELECT {n}, current_user"),
        10 | 11 => format!("EXECUTE p{n}"),
        12 => format!("DEALLOCATE p{n}"),
        13 => format!("DEALLOCATE PREPARE p{n}"),
        14 => "DEALLOCATE ALL".to_owned(),
        15 => "SELECT prepares()".to_owned(),
        16 => format!("DECLARE cur{n} CURSOR WITH HOLD FOR SELECT id FROM t ORDER BY id"),
        17 => format!("DECLARE cur{n} CURSOR FOR SELECT id FROM t ORDER BY id"),
        18 | 19 => format!("FETCH 2 FROM cur{n}"),
        20 => format!("CLOSE cur{n}"),
        21 => "CLOSE ALL".to_owned(),
        22 => format!("SELECT pg_advisory_lock({key})"),
        23 => format!("SELECT pg_try_advisory_lock({key}, {n}), pg_advisory_xact_lock({key})"),
        24 => format!("SELECT pg_advisory_unlock({key})"),
        25 => "SELECT pg_advisory_unlock_all()".to_owned(),
        26 => format!("SELECT takes_lock({key})"),
        27 | 28 => format!("LISTEN ch{}", who.session),
        29 => format!("NOTIFY ch{}, '{n}'", who.session),
        30 => format!("SELECT pg_notify('ch{}', 'f')", who.session),
        31 => pick(rng, &["UNLISTEN *", "UNLISTEN ch0"]).to_owned(),
        32 => format!("SELECT listens('ch{}')", who.session),
        33 => "DISCARD ALL".to_owned(),
        34 => pick(rng, &["DISCARD TEMP", "DISCARD PLANS", "DISCARD SEQUENCES"]).to_owned(),
        _ => format!("DEALLOCATE s{n}"),
    }
}

/// Rows and tables of its own.
pub(super) fn writes(rng: &Rng, who: Speaker) -> String {
    if !who.writes {
        return reads(rng);
    }
    let (own, n) = (format!("own{}", who.slot), rng.below(9));
    match rng.below(10) {
        0..=2 => format!("INSERT INTO {own} (v) VALUES ('v{n}') RETURNING id, v"),
        3 => format!("INSERT INTO {own} (v) VALUES ('forbidden')"),
        4 => format!("UPDATE {own} SET v = 'u{n}' WHERE id % 9 = {n}"),
        5 => format!("DELETE FROM {own} WHERE id % 9 = {n}"),
        6 => format!("ALTER TABLE {own} ADD COLUMN IF NOT EXISTS more{n} integer"),
        7 => format!("ALTER TABLE {own} DROP COLUMN IF EXISTS more{n}"),
        8 => format!("TRUNCATE {own}"),
        _ => format!("SELECT id, v FROM {own} ORDER BY id"),
    }
}

/// Begins, ends and goes back.
pub(super) fn transaction(rng: &Rng) -> &'static str {
    const ALL: &[&str] = &[
        "BEGIN",
        "BEGIN",
        "START TRANSACTION ISOLATION LEVEL REPEATABLE READ",
        "COMMIT",
        "COMMIT",
        "COMMIT AND CHAIN",
        "ROLLBACK",
        "ROLLBACK AND CHAIN",
        "SAVEPOINT a",
        "SAVEPOINT a",
        "ROLLBACK TO a",
        "RELEASE a",
        "SAVEPOINT b",
        "ROLLBACK TO SAVEPOINT b",
        "SET TRANSACTION ISOLATION LEVEL SERIALIZABLE",
        "END; SELECT 1",
        "COMMIT; BEGIN",
    ];
    ALL[rng.below(ALL.len())]
}

/// Anything but COPY.
pub(super) fn any(rng: &Rng, who: Speaker) -> String {
    match rng.below(100) {
        0..=20 => reads(rng),
        21..=24 => hidden(rng, who),
        25..=49 => sets(rng),
        50..=55 => roles(rng).to_owned(),
        56..=75 => holds(rng, who),
        76..=82 => writes(rng, who),
        83..=88 => fails(rng),
        _ => transaction(rng).to_owned(),
    }
}

/// Whether a text has literals of dates or times.
pub(super) fn is_read_by_settings(text: &str) -> bool {
    ["times", "::date", "::interval"].iter().any(|word| text.contains(word))
}

/// Texts that clients prepare by name; few, so that they meet.
pub(super) fn prepared(rng: &Rng, who: Speaker) -> String {
    const ALL: &[&str] = &[
        "SELECT $1::integer + 1",
        "SELECT v FROM t WHERE id = $1::integer",
        "SELECT w FROM which ORDER BY w",
        "SELECT v FROM shared WHERE id = 1",
        "SELECT count(*) FROM times WHERE at > '2024-01-01 03:00'",
        "SELECT count(*) FROM times WHERE at > '2024-01-01 07:00'",
        "SELECT '01/02/2024'::date - '2024-01-01'::date",
        "SHOW TimeZone",
        "SELECT current_user, session_user",
        "SELECT coalesce(current_setting('my.tenant', true), '')",
        "SELECT set_config('my.tenant', $1::text, false)",
        "SET work_mem = '4MB'",
        "SET LOCAL work_mem = '3MB'",
        "SET search_path = alt, public",
        "RESET search_path",
        "SELECT sets_tenant('p')",
        "DEALLOCATE p1",
        "DEALLOCATE s1",
        "DEALLOCATE ALL",
        "EXECUTE p1",
        "PREPARE p1 AS SELECT 11",
        "BEGIN",
        "COMMIT",
        "ROLLBACK",
        "SAVEPOINT a",
        "ROLLBACK TO a",
        "SELECT 1/0",
        "SELEC 1",
        "",
        "SELECT nothing FROM nowhere",
        "CREATE TEMP TABLE tmp (a integer)",
        "DECLARE cur1 CURSOR WITH HOLD FOR SELECT id FROM t ORDER BY id",
        "FETCH 1 FROM cur1",
        "DISCARD ALL",
        "SET ROLE one",
        "RESET ROLE",
    ];
    match rng.below(10) {
        0 => writes(rng, who),
        1 => holds(rng, who),
        _ => ALL[rng.below(ALL.len())].to_owned(),
    }
}
