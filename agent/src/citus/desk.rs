//! Where the REST API leaves what other groups' leaders say, one pigeonhole for each database, and
//! where the databases leave how they stand.

use std::collections::{BTreeMap, BTreeSet};

use kornak_cluster::GroupId;
use parking_lot::Mutex;
use tokio::sync::{Notify, oneshot, watch};

use super::flight::{Answer, Request};

/// Notifications that wait in one database. Groups send two for each switchover, and there is one
/// switchover at a time; more would be a mistake of the senders, who are told so.
const QUEUE: usize = 32;

/// How one database's `pg_dist_node` stands.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Standing {
    /// Sentences about what does not agree with the store; empty: all does.
    pub differences: Vec<String>,
    /// Why it cannot be looked at or changed.
    pub trouble: Option<String>,
    /// Every node has the metadata.
    pub synced: bool,
    /// Groups whose primary does not have them yet.
    pub behind: BTreeSet<GroupId>,
    /// Groups that have a row for their primary, and where it says that this is.
    pub primaries: BTreeMap<GroupId, String>,
    /// Where the rows say that standbys are, of the groups that have any.
    pub secondaries: BTreeMap<GroupId, BTreeSet<String>>,
}

impl Standing {
    /// Whether somebody waits for the difference: a proxy lets sessions go on when it hears that a new
    /// primary is known.
    pub fn is_awaited(&self, before: Option<&Self>) -> bool {
        before
            .is_none_or(|before| before.primaries != self.primaries || before.behind != self.behind)
    }

    /// Rows and store agree, as far as is known.
    pub fn agrees(&self) -> bool {
        self.differences.is_empty() && self.trouble.is_none()
    }
}

#[derive(Debug, Default)]
struct Inbox {
    waiting: Mutex<Vec<(Request, oneshot::Sender<Answer>)>>,
    arrived: Notify,
}

/// One for each agent.
#[derive(Debug)]
pub struct Desk {
    inboxes: BTreeMap<String, Inbox>,
    /// By database; empty while this node does not lead the coordinator.
    pub standings: watch::Sender<BTreeMap<String, Standing>>,
    /// Hosts of the REST APIs of all groups' members.
    pub hosts: watch::Sender<BTreeSet<String>>,
    /// Age of the oldest prepared transaction of this server in seconds.
    pub oldest_prepared: watch::Sender<f64>,
}

impl Desk {
    /// A desk with an inbox for each database.
    pub fn new(databases: &[String]) -> Self {
        let inboxes = databases.iter().map(|name| (name.clone(), Inbox::default()));
        Self {
            inboxes: inboxes.collect(),
            standings: watch::Sender::default(),
            hosts: watch::Sender::default(),
            oldest_prepared: watch::Sender::default(),
        }
    }

    /// Leaves a request in every database and waits for the worst of their answers.
    pub async fn ask(&self, request: &Request) -> Answer {
        let answers = self.inboxes.values().map(|inbox| {
            let (answer, answered) = oneshot::channel();
            let mut waiting = inbox.waiting.lock();
            if waiting.len() < QUEUE {
                waiting.push((request.clone(), answer));
                inbox.arrived.notify_one();
            }
            answered
        });
        let answers = futures_util::future::join_all(answers).await;
        let given = answers.into_iter().map(|answer| answer.unwrap_or(Answer::Busy));
        given.max_by_key(|answer| *answer != Answer::Done).unwrap_or(Answer::NotHere)
    }

    /// Takes the requests that have arrived for a database.
    pub(crate) fn take(&self, database: &str) -> Vec<(Request, oneshot::Sender<Answer>)> {
        self.inboxes
            .get(database)
            .map(|inbox| std::mem::take(&mut *inbox.waiting.lock()))
            .unwrap_or_default()
    }

    /// Completes when something has arrived for a database.
    pub(crate) async fn arrived(&self, database: &str) {
        match self.inboxes.get(database) {
            Some(inbox) => inbox.arrived.notified().await,
            None => std::future::pending().await,
        }
    }

    /// Notes where the members of all groups are.
    pub(crate) fn knows(&self, hosts: &BTreeSet<String>) {
        self.hosts.send_if_modified(|known| {
            let other = known != hosts;
            known.clone_from(hosts);
            other
        });
    }

    /// Notes how a database stands.
    pub(crate) fn stands(&self, database: &str, standing: Option<Standing>) {
        self.standings.send_if_modified(|known| match standing {
            Some(standing) if known.get(database) != Some(&standing) => {
                known.insert(database.to_owned(), standing);
                true
            }
            Some(_) => false,
            None => known.remove(database).is_some(),
        });
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use kornak_cluster::{GroupId, Moment, Revision};

    use super::super::flight::Event;
    use super::*;

    fn request() -> Request {
        Request {
            event: Event::AfterPromote,
            group: GroupId(1),
            leader: "a".to_owned(),
            received: Moment::at_millis(0),
            timeout: Duration::ZERO,
            cooldown: Duration::ZERO,
            hold: None,
            record: Revision::NONE,
        }
    }

    #[tokio::test]
    async fn the_worst_answer_of_all_databases_counts() {
        let desk = Desk::new(&["a".to_owned(), "b".to_owned()]);
        let asked = request();
        let asking = desk.ask(&asked);
        let answering = async {
            for (database, said) in [("a", Answer::Busy), ("b", Answer::Done)] {
                desk.arrived(database).await;
                let taken = desk.take(database);
                assert_eq!(taken.len(), 1);
                for (_, answer) in taken {
                    answer.send(said).unwrap();
                }
            }
        };
        assert_eq!(tokio::join!(asking, answering).0, Answer::Busy);
    }

    #[tokio::test]
    async fn a_full_pigeonhole_says_so() {
        let desk = Desk::new(&["a".to_owned()]);
        let asked = request();
        let mut waiting = Vec::new();
        for _ in 0..QUEUE {
            let mut ask = Box::pin(desk.ask(&asked));
            assert!(futures_util::poll!(&mut ask).is_pending());
            waiting.push(ask);
        }
        assert_eq!(desk.ask(&asked).await, Answer::Busy);
    }
}
