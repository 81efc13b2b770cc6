//! Whether a server would let a login in that has proven itself: what the catalogues say of the role
//! and the database.
//!
//! A server says so itself when it is logged in to; but on a pool's connection somebody has logged in
//! long ago. So each login to a pool asks, and what an administrator has taken away is gone with the
//! next login. Only `pg_hba.conf` is not looked at here; see [`crate::clients::login`].

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use kornak_protocol::error::ErrorFields;
use kornak_protocol::sqlstate::{
    INSUFFICIENT_PRIVILEGE, INVALID_AUTHORIZATION, INVALID_CATALOG_NAME,
    OBJECT_NOT_IN_PREREQUISITE_STATE, TOO_MANY_CONNECTIONS,
};
use parking_lot::Mutex;

use crate::admission::lanes::{ASK_LIMIT, Lanes, Rows};
use crate::net::backend::{Address, DialError};

/// How long an answer is used when nobody answers.
const STALE: Duration = Duration::from_secs(600);

/// How long all of it may take if there is an answer of before.
const PATIENCE: Duration = Duration::from_millis(500);

/// Pairs of roles and databases remembered; they have proven themselves. 4,096 are less than 1 MB.
const MAX_PAIRS: usize = 4096;

/// Every role may read these catalogues. In the order of PostgreSQL's own checks: why not, whether the
/// role is a superuser, whether its connections are used up, and the database's.
const QUERY: &str = "\
    SELECT CASE WHEN r.oid IS NULL THEN 'role' \
                WHEN NOT r.rolcanlogin THEN 'login' \
                WHEN NOT r.rolsuper AND r.rolconnlimit = 0 THEN 'role limit' \
                WHEN d.oid IS NULL THEN 'database' \
                WHEN d.datconnlimit = -2 THEN 'invalid' \
                WHEN NOT d.datallowconn THEN 'closed' \
                WHEN NOT pg_catalog.has_database_privilege(r.oid, d.oid, 'CONNECT') THEN 'privilege' \
                WHEN NOT r.rolsuper AND d.datconnlimit = 0 THEN 'database limit' END, \
           r.rolsuper::pg_catalog.text, \
           (CASE WHEN r.rolconnlimit > 0 AND NOT r.rolsuper \
                 THEN (SELECT pg_catalog.count(*) FROM pg_catalog.pg_stat_activity AS a \
                       WHERE a.usesysid = r.oid AND a.backend_type = 'client backend') \
                      >= r.rolconnlimit END)::pg_catalog.text, \
           (CASE WHEN d.datconnlimit > 0 AND NOT r.rolsuper \
                 THEN (SELECT pg_catalog.count(*) FROM pg_catalog.pg_stat_activity AS a \
                       WHERE a.datid = d.oid AND a.backend_type = 'client backend') \
                      >= d.datconnlimit END)::pg_catalog.text \
    FROM (SELECT $1::pg_catalog.text AS role, $2::pg_catalog.text AS database) AS asked \
    LEFT JOIN pg_catalog.pg_roles AS r ON r.rolname = asked.role \
    LEFT JOIN pg_catalog.pg_database AS d ON d.datname = asked.database";

/// Why a server would refuse.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    NoRole,
    NoLogin,
    RoleLimit,
    NoDatabase,
    InvalidDatabase,
    ClosedDatabase,
    NoPrivilege,
    DatabaseLimit,
}

impl Refusal {
    fn parse(word: &[u8]) -> Option<Self> {
        Some(match word {
            b"role" => Self::NoRole,
            b"login" => Self::NoLogin,
            b"role limit" => Self::RoleLimit,
            b"database" => Self::NoDatabase,
            b"invalid" => Self::InvalidDatabase,
            b"closed" => Self::ClosedDatabase,
            b"privilege" => Self::NoPrivilege,
            b"database limit" => Self::DatabaseLimit,
            _ => return None,
        })
    }

    /// In PostgreSQL's words.
    pub fn fields(self, user: &[u8], database: &[u8]) -> ErrorFields {
        let (user, database) = (String::from_utf8_lossy(user), String::from_utf8_lossy(database));
        match self {
            Self::NoRole => {
                let text = format!("role \"{user}\" does not exist");
                ErrorFields::fatal(INVALID_AUTHORIZATION, text)
            }
            Self::NoLogin => {
                let text = format!("role \"{user}\" is not permitted to log in");
                ErrorFields::fatal(INVALID_AUTHORIZATION, text)
            }
            Self::RoleLimit => {
                let text = format!("too many connections for role \"{user}\"");
                ErrorFields::fatal(TOO_MANY_CONNECTIONS, text)
            }
            Self::NoDatabase => {
                let text = format!("database \"{database}\" does not exist");
                ErrorFields::fatal(INVALID_CATALOG_NAME, text)
            }
            Self::InvalidDatabase => {
                let text = format!("cannot connect to invalid database \"{database}\"");
                ErrorFields::fatal(OBJECT_NOT_IN_PREREQUISITE_STATE, text)
                    .hint("Use DROP DATABASE to drop invalid databases.")
            }
            Self::ClosedDatabase => {
                let text =
                    format!("database \"{database}\" is not currently accepting connections");
                ErrorFields::fatal(OBJECT_NOT_IN_PREREQUISITE_STATE, text)
            }
            Self::NoPrivilege => {
                let text = format!("permission denied for database \"{database}\"");
                ErrorFields::fatal(INSUFFICIENT_PRIVILEGE, text)
                    .detail("User does not have CONNECT privilege.")
            }
            Self::DatabaseLimit => {
                let text = format!("too many connections for database \"{database}\"");
                ErrorFields::fatal(TOO_MANY_CONNECTIONS, text)
            }
        }
    }
}

/// The rights of a role, as the catalogues have them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rights {
    /// Why the login is refused whoever else is connected.
    pub refusal: Option<Refusal>,
    pub is_superuser: bool,
    /// Why another server connection is refused at this moment.
    pub crowded: Option<Refusal>,
}

impl Rights {
    fn read(rows: &Rows) -> Option<Self> {
        let row = rows.first()?;
        let text = |at: usize| row.get(at).and_then(Option::as_deref);
        let refusal = match text(0) {
            None => None,
            // A word of a server that is not known is no permission.
            Some(word) => Some(Refusal::parse(word)?),
        };
        let crowded = match (text(2), text(3)) {
            (Some(b"true"), _) => Some(Refusal::RoleLimit),
            (_, Some(b"true")) => Some(Refusal::DatabaseLimit),
            _ => None,
        };
        Some(Self { refusal, is_superuser: text(1) == Some(b"true"), crowded })
    }
}

/// A role and a database.
type Pair = (Bytes, Bytes);

/// Asks, and remembers the answers for the time when nobody answers.
#[derive(Debug)]
pub struct Access {
    lanes: Arc<Lanes>,
    known: Mutex<HashMap<Pair, (Instant, Rights)>>,
}

impl Access {
    /// Nothing is known yet.
    pub fn new(lanes: Arc<Lanes>) -> Self {
        Self { lanes, known: Mutex::default() }
    }

    /// Asks the servers in this order; if none answers, uses the last answer.
    ///
    /// # Errors
    /// Nobody has said anything.
    pub async fn find(&self, pair: &Pair, servers: &[Address]) -> Result<Rights, DialError> {
        let came = Instant::now();
        let limit = match self.remembered(pair, STALE) {
            Some(_) => PATIENCE,
            None => ASK_LIMIT * u32::try_from(servers.len()).unwrap_or(1).max(1),
        };
        let asked = tokio::time::timeout(limit, self.ask(pair, servers, came)).await;
        match asked.unwrap_or(Err(DialError::Timeout)) {
            Err(error) if error.is_about_server() || error.is_ours() => {
                self.remembered(pair, STALE).ok_or(error)
            }
            answered => answered,
        }
    }

    fn remembered(&self, pair: &Pair, limit: Duration) -> Option<Rights> {
        let known = self.known.lock();
        let (asked, rights) = known.get(pair)?;
        (asked.elapsed() < limit).then_some(*rights)
    }

    async fn ask(
        &self,
        pair: &Pair,
        servers: &[Address],
        came: Instant,
    ) -> Result<Rights, DialError> {
        let mut turn = self.lanes.turn(pair).await?;
        // Somebody may have asked after we came, while we waited for our turn.
        let shared = self.known.lock().get(pair).copied();
        if let Some((_, rights)) = shared.filter(|(asked, _)| *asked >= came) {
            return Ok(rights);
        }
        let mut last = DialError::Timeout;
        for server in servers {
            let asked = Instant::now();
            match turn.ask(server, QUERY, &[Some(&pair.0), Some(&pair.1)]).await {
                Ok(rows) => {
                    let rights = Rights::read(&rows).ok_or_else(|| DialError::Protocol {
                        what: "no answer about a role and a database".to_owned(),
                    })?;
                    self.remember(pair, asked, rights);
                    return Ok(rights);
                }
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    fn remember(&self, pair: &Pair, asked: Instant, rights: Rights) {
        let mut known = self.known.lock();
        if known.len() >= MAX_PAIRS && !known.contains_key(pair) {
            known.retain(|_, (asked, _)| asked.elapsed() < STALE);
            if known.len() >= MAX_PAIRS {
                return;
            }
        }
        known.insert(pair.clone(), (asked, rights));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_read_and_an_unknown_word_is_no_permission() {
        let read = |row: [Option<&'static str>; 4]| {
            let row = row.map(|text| text.map(|text| Bytes::from_static(text.as_bytes())));
            Rights::read(&vec![row.to_vec()])
        };
        let usual = Rights { refusal: None, is_superuser: false, crowded: None };
        assert_eq!(read([None, Some("false"), None, Some("false")]), Some(usual));
        let boss = Rights { is_superuser: true, ..usual };
        assert_eq!(read([None, Some("true"), None, None]), Some(boss));
        for (word, refusal) in [
            ("role", Refusal::NoRole),
            ("login", Refusal::NoLogin),
            ("role limit", Refusal::RoleLimit),
            ("database", Refusal::NoDatabase),
            ("invalid", Refusal::InvalidDatabase),
            ("closed", Refusal::ClosedDatabase),
            ("privilege", Refusal::NoPrivilege),
            ("database limit", Refusal::DatabaseLimit),
        ] {
            let found = read([Some(word), None, None, None]).unwrap();
            assert_eq!(found.refusal, Some(refusal));
        }
        let crowded = read([None, Some("false"), Some("true"), Some("true")]).unwrap();
        assert_eq!(crowded.crowded, Some(Refusal::RoleLimit));
        assert_eq!(read([Some("moon"), None, None, None]), None);
        assert_eq!(Rights::read(&Vec::new()), None);
    }
}
