//! Which clients share connections.

use kornak_config::proxy::LimitSettings;
use tokio::sync::mpsc::unbounded_channel;
use zeroize::Zeroizing;

use super::*;
use crate::admission::doors::Doors;
use crate::registry::Registry;

#[test]
fn logins_of_different_proofs_share_no_credentials() {
    let limits = Limits {
        pool_size: 2,
        max_servers: 2,
        wait_timeout: Duration::from_secs(1),
        hold_timeout: Duration::from_secs(1),
        notice_after: None,
        idle_timeout: None,
    };
    let (orders, _taken) = unbounded_channel();
    let lender = Arc::new(Lender::new(vec![orders], [limits], Shares::default()));
    let registry = Arc::new(Registry::default());
    let doors = Arc::new(Doors::new(&LimitSettings::default()));
    let join = |credentials: Credentials| {
        let newcomer = Newcomer {
            listener: 0,
            user: Bytes::from_static(b"app"),
            database: Bytes::from_static(b"shop"),
            startup: Bytes::from_static(b"packet"),
            credentials,
        };
        let entry = registry.enter(0, 0, doors.knock(None));
        lender.join(newcomer, Arc::clone(entry.handle()).into(), 0)
    };
    let password = |word: &str| Credentials::Password(Zeroizing::new(word.as_bytes().to_vec()));
    let proven = join(password("first"));
    let trusted = join(Credentials::None);
    assert_ne!(proven.kind.id, trusted.kind.id);
    assert_eq!(proven.kind.pool, trusted.kind.pool, "they share the pool's bound");
    assert_eq!(proven.kind.identity().credentials, password("first"));
    proven.kind.welcomed(&Arc::default());
    assert!(join(password("first")).kind.identity().was_taken, "by a server");
    let newer = join(password("second"));
    assert!(
        !proven.kind.identity().was_taken,
        "a login has to prove itself by the password of now"
    );
    assert_eq!(proven.kind.id, newer.kind.id);
    assert_eq!(proven.kind.identity().credentials, password("second"), "the newest counts");
    assert_eq!(trusted.kind.identity().credentials, Credentials::None);
    let kind = trusted.kind.id;
    drop(trusted);
    assert_ne!(join(Credentials::None).kind.id, proven.kind.id, "after {kind:?} is forgotten");
}
