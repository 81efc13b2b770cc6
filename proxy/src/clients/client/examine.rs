//! Asking the server what a session holds: whether it still holds what pinned it, and whether
//! functions left something on it that shows in no text.
//!
//! A statement of ours between two of the client's, while the session is inside the gate.

use bytes::BytesMut;
use kornak_cluster::discard;
use kornak_protocol::frontend::Target;
use kornak_protocol::{backend, frontend};

use super::pooled::tell;
use super::{Client, End};
use crate::sabotage::{self, Sabotage};
use crate::session::journal::Examined;

/// Asks what a session may hold that keeps its connection from others, in one row: advisory locks, temporary
/// relations, channels, statements of SQL PREPARE, cursors WITH HOLD, its settings (without those of the
/// transaction, whose source may be called the session's) as the
/// statements that would make them again, who it is, and the names of its channels. Instead of the
/// words `OF ITS OWN` stand the names of its own parameters.
const EXAMINE: &str = "\
    SELECT EXISTS (SELECT FROM pg_catalog.pg_locks \
                   WHERE locktype OPERATOR(pg_catalog.=) 'advisory' \
                   AND objsubid OPERATOR(pg_catalog.<) 3::pg_catalog.int2 \
                   AND pid OPERATOR(pg_catalog.=) pg_catalog.pg_backend_pid()), \
           EXISTS (SELECT FROM pg_catalog.pg_class \
                   WHERE relnamespace OPERATOR(pg_catalog.=) pg_catalog.pg_my_temp_schema()), \
           EXISTS (SELECT FROM pg_catalog.pg_listening_channels()), \
           EXISTS (SELECT FROM pg_catalog.pg_prepared_statements WHERE from_sql), \
           EXISTS (SELECT FROM pg_catalog.pg_cursors WHERE is_holdable), \
           (SELECT pg_catalog.string_agg(pg_catalog.format(\
                E'%s\\x02SELECT pg_catalog.set_config(%L, %L, false)', name, name, setting), \
                E'\\x01' ORDER BY turn) \
            FROM (SELECT name, setting, 1 FROM pg_catalog.pg_settings \
                  WHERE source OPERATOR(pg_catalog.=) 'session' \
                  AND name OPERATOR(pg_catalog.<>) ALL (ARRAY['transaction_isolation', \
                      'transaction_read_only', 'transaction_deferrable']::pg_catalog.text[]) \
                  UNION ALL \
                  SELECT name, pg_catalog.current_setting(name, true), 1 \
                  FROM pg_catalog.unnest(ARRAY[OF ITS OWN]::pg_catalog.text[]) AS own (name) \
                  WHERE pg_catalog.current_setting(name, true) IS NOT NULL \
                  OF FUNCTIONS\
                  UNION ALL \
                  SELECT 'role', pg_catalog.current_setting('role'), 2 \
                  WHERE pg_catalog.current_setting('role') OPERATOR(pg_catalog.<>) 'none') \
                 AS s (name, setting, turn)), \
           session_user, \
           (SELECT pg_catalog.concat(pg_catalog.count(*), E'\\x02', \
                                     pg_catalog.string_agg(channel, E'\\x01')) \
            FROM pg_catalog.pg_listening_channels() AS channel)";

/// Names of parameters of its own that the database's functions set, as far as their texts say them plainly, and
/// that are set in this session. Stands instead of the words `OF FUNCTIONS` when functions were called.
const OF_FUNCTIONS: &str = "\
    UNION ALL \
    SELECT name, setting, 1 FROM \
        (SELECT DISTINCT pg_catalog.lower(it[1]) AS name, \
                pg_catalog.current_setting(it[1], true) AS setting \
         FROM pg_catalog.pg_proc AS p, \
              pg_catalog.regexp_matches(\
                  CASE WHEN p.prosrc OPERATOR(pg_catalog.=) '' \
                       THEN pg_catalog.pg_get_functiondef(p.oid) ELSE p.prosrc END, \
                  $$(?:set_config\\s*\\(\\s*'|\\mset\\s+(?:session\\s+)?)([a-z_]\\w*(?:\\.[a-z_]\\w*)+)$$, 'gi') AS it \
         WHERE p.oid OPERATOR(pg_catalog.>=) 16384::pg_catalog.oid \
         AND p.prokind OPERATOR(pg_catalog.<>) 'a') AS found \
    WHERE setting OPERATOR(pg_catalog.<>) '' AND NOT name OPERATOR(pg_catalog.=) \
          ANY (ARRAY[OF ITS OWN]::pg_catalog.text[]) ";

/// Asks what functions may have left in a session that nothing pins: temporary relations, statements of
/// SQL PREPARE, cursors WITH HOLD, and how many channels. Cheap, for it is asked of everybody.
const GLANCE: &str = "\
    SELECT EXISTS (SELECT FROM pg_catalog.pg_class \
                   WHERE relnamespace OPERATOR(pg_catalog.=) pg_catalog.pg_my_temp_schema()) \
        OR EXISTS (SELECT FROM pg_catalog.pg_prepared_statements WHERE from_sql) \
        OR EXISTS (SELECT FROM pg_catalog.pg_cursors WHERE is_holdable), \
           (SELECT pg_catalog.count(*) FROM pg_catalog.pg_listening_channels())";

/// Before each question: whoever looks into `pg_stat_activity` sees whose it is, and so does
/// [`crate::background::sampler`].
pub const MARK: &str = "/* kornak asks what the session holds */ ";

/// Under this name the statement is prepared: a simple query would destroy the client's unnamed one.
const NAME: &[u8] = b"kornak_examine";

/// The outcome of a question.
enum Heard {
    /// The text of one row.
    Row(Vec<Option<Vec<u8>>>),
    /// The connection broke.
    Broken,
}

impl Client {
    /// Asks the server what the session holds, unless a glance shows that it is as it seems.
    pub(super) async fn examine(&mut self) -> Result<(), End> {
        let is_asked = self.talk.session.pinned().is_some() || self.talk.session.must_be_asked();
        if !is_asked && !self.looks_different().await? {
            self.talk.leave_gate();
            self.log_in_ahead();
            return Ok(());
        }
        let Some(Heard::Row(row)) = self.ask(&self.question()).await else {
            return self.after_loss();
        };
        if row.len() < 8 {
            // It was refused: a timeout of the session's own, for example.
            self.talk.session.not_examined();
            let pin = self.talk.session.pinned();
            self.talk.handle.set_pin(pin);
            if self.talk.member.is_none() {
                self.talk.leave_gate();
            }
            return Ok(());
        }
        let held = |at: usize| row.get(at).and_then(Option::as_deref).is_none_or(|it| it == b"t");
        let text = |at: usize| row.get(at).and_then(Option::as_deref).unwrap_or_default();
        self.talk.session.examined(&Examined {
            locks: held(0),
            temporary: held(1),
            listens: held(2),
            prepared: held(3),
            hold_cursor: held(4),
            settings: text(5),
            acts_as: Some(text(6)).filter(|user| *user != self.identity.user),
            channels: text(7),
        });
        if !held(0) {
            self.talk.handle.set_advisory_locks(false);
        }
        let pin = self.talk.session.pinned();
        self.talk.handle.set_pin(pin);
        if self.talk.member.is_none() {
            self.talk.leave_gate();
            if pin.is_none() {
                self.log_in_ahead();
            }
        } else if pin.is_none() {
            // A cursor that is gone has kept it inside, and without a connection it has to come in anew.
            self.talk.leave_gate();
            return self.part().await;
        }
        Ok(())
    }

    fn question(&self) -> String {
        let literal = |name: &[u8]| {
            let name = String::from_utf8_lossy(name).replace('\'', "''");
            format!("E'{}'", name.replace('\\', "\\\\"))
        };
        let custom = self.talk.session.custom().filter(|_| !sabotage::is(Sabotage::Custom));
        let names: Vec<String> = custom.map(literal).collect();
        let called = self.talk.session.must_be_asked();
        let of_functions = if called { OF_FUNCTIONS } else { "" };
        EXAMINE.replace("OF FUNCTIONS", of_functions).replace("OF ITS OWN", &names.join(", "))
    }

    async fn looks_different(&mut self) -> Result<bool, End> {
        match self.ask(GLANCE).await {
            Some(Heard::Row(row)) => {
                let text = |at: usize| row.get(at).and_then(Option::as_deref).unwrap_or_default();
                let channels = self.talk.session.channels().to_string();
                Ok(text(0) != b"f" || text(1) != channels.as_bytes())
            }
            Some(Heard::Broken) | None => self.after_loss().map(|()| false),
        }
    }

    /// A statement of ours; `None` if there is no server.
    async fn ask(&mut self, statement: &str) -> Option<Heard> {
        let shared = std::sync::Arc::clone(&self.talk.shared);
        // Never closed.
        let _room = shared.asking.acquire().await;
        let mut link = self.talk.link.take()?;
        // What it was told of this connection, and what has changed on it since: the pool's own notes are of before.
        let mut reported = self.talk.session.told().clone();
        let mut out = BytesMut::new();
        put_question(statement, &mut out);
        let limit = shared.settings().limits.connect_timeout;
        let told = tell(&mut link, &out, 1, &mut reported, limit).await;
        self.talk.link = Some(link);
        let Ok(answers) = told else { return Some(Heard::Broken) };
        self.talk.to_client.extend_from_slice(&answers.aside);
        if reported != *self.talk.session.told() {
            self.talk.session.moved(&reported, &mut self.talk.to_client);
        }
        let row = answers.rows.first().and_then(|row| backend::data_row(row).ok());
        let owned = |value: Option<&[u8]>| value.map(<[u8]>::to_vec);
        Some(Heard::Row(row.unwrap_or_default().into_iter().map(owned).collect()))
    }
}

fn put_question(statement: &str, out: &mut BytesMut) {
    // Constant texts always fit.
    let statement = format!("{MARK}{statement}");
    discard::message_fits(frontend::put_parse(NAME, statement.as_bytes(), &[], out));
    discard::message_fits(frontend::put_bind(b"", NAME, &[], out));
    discard::message_fits(frontend::put_execute(b"", 0, out));
    discard::message_fits(frontend::put_close(Target::Statement(NAME), out));
    frontend::put_sync(out);
}
