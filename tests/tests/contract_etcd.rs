//! Whether a real etcd keeps the promises of a store, and what ours does when etcd fails.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use kornak_cluster::Revision;
use kornak_dcs::contract::{PROMISES, Pair, shows};
use kornak_dcs::etcd::{EtcdDcs, EtcdSettings, SILENCE};
use kornak_dcs::{Compare, Dcs, DcsError, Op, Reach, Txn};
use kornak_tests::run::etcd::{Etcd, TlsFiles};
use kornak_tests::run::port::Port;
use kornak_tests::run::scratch::Scratch;
use kornak_tests::run::wait::until;

/// Longer than a request may take while one of three members is stalled.
const BOUNDED: Duration = Duration::from_secs(4);

/// Longer than an election, and than noticing a stalled member.
const RECOVERED: Duration = Duration::from_secs(15);

fn settings(endpoints: Vec<String>) -> EtcdSettings {
    EtcdSettings { retry_timeout: Duration::from_secs(3), ..EtcdSettings::new(endpoints) }
}

fn handle(endpoints: Vec<String>) -> Arc<dyn Dcs> {
    Arc::new(EtcdDcs::new(settings(endpoints)))
}

fn put(key: &str, value: &str) -> Txn {
    Txn::just(Op::put(key, value))
}

/// Writes until it is known to be done. The value is always the same, so once more does no harm.
async fn write(dcs: &dyn Dcs, key: &str, value: &str) {
    until(RECOVERED, "a write is done", || async {
        dcs.txn(put(key, value)).await.map_err(|error| error.to_string())
    })
    .await;
}

async fn keeps_all_promises(one: &Arc<dyn Dcs>, other: &Arc<dyn Dcs>) {
    let promises = PROMISES.iter().map(|(name, promise)| {
        let (one, other) = (Arc::clone(one), Arc::clone(other));
        let promise = tokio::spawn(async move {
            let prefix = format!("/{name}/");
            promise(Pair { one: &*one, other: &*other, prefix: &prefix }).await;
        });
        (*name, promise)
    });
    for (name, promise) in promises.collect::<Vec<_>>() {
        let kept = promise.await.is_ok();
        assert!(kept, "{name}: see above");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn one_member_keeps_the_promises_of_a_store() -> Result<()> {
    let mut etcd = Etcd::start(1).await?;
    keeps_all_promises(&handle(etcd.endpoints()), &handle(etcd.endpoints())).await;
    etcd.passed();
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn three_members_keep_the_promises_of_a_store() -> Result<()> {
    let mut etcd = Etcd::start(3).await?;
    let mut reversed = etcd.endpoints();
    reversed.reverse();
    keeps_all_promises(&handle(etcd.endpoints()), &handle(reversed)).await;
    etcd.passed();
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_follower_sees_a_write_within_milliseconds() -> Result<()> {
    let mut etcd = Etcd::start(3).await?;
    let (writer, reader) = (handle(etcd.endpoints()), handle(etcd.endpoints()));
    let mut follow = reader.follow("/quick/");
    shows(&mut follow, RECOVERED, "a first view", |_| true).await;
    let (mut writes, mut sights) = (Vec::new(), Vec::new());
    for count in 0..50 {
        let value = count.to_string();
        let start = Instant::now();
        let done = writer.txn(put("/quick/a", &value)).await?;
        writes.push(start.elapsed());
        shows(&mut follow, RECOVERED, "the write", |view| view.revision >= done.revision).await;
        sights.push(start.elapsed());
    }
    writes.sort();
    sights.sort();
    println!("write: {:?}, seen: {:?} (medians)", writes[25], sights[25]);
    let lag = sights[25].saturating_sub(writes[25]);
    assert!(lag < Duration::from_millis(20), "seen {lag:?} after the writer knew");
    etcd.passed();
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_leases_and_follows_survive_the_kill_of_their_member() -> Result<()> {
    let mut etcd = Etcd::start(3).await?;
    let dcs = handle(etcd.endpoints());
    let lease = dcs.grant(Duration::from_secs(10)).await?.lease;
    dcs.txn(Txn::just(Op::put_leased("/k/leader", "a", lease))).await?;
    dcs.keep_alive(lease).await?;
    let mut follow = dcs.follow("/k/");
    shows(&mut follow, RECOVERED, "the leader", |view| view.keys.len() == 1).await;

    etcd.kill_member(0);
    let start = Instant::now();
    dcs.keep_alive(lease).await.context("a renewal goes to another member")?;
    assert!(start.elapsed() < BOUNDED, "the renewal took {:?}", start.elapsed());
    write(&*dcs, "/k/a", "after").await;
    let seen = |view: &kornak_dcs::View| view.get("/k/a").is_some_and(|a| a.value == "after");
    let view = shows(&mut follow, RECOVERED, "the write", seen).await;
    assert_eq!(view.keys.len(), 2, "the leased key is still there");
    etcd.passed();
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn endpoints_that_refuse_or_are_not_named_cost_nothing() -> Result<()> {
    let mut etcd = Etcd::start(3).await?;
    let closed = Port::free();
    let named = vec![closed.address(), etcd.endpoints()[0].clone()];
    let dcs = EtcdDcs::new(EtcdSettings { discover: true, ..settings(named) });
    let start = Instant::now();
    // Not idempotent, so this works only because nothing was sent.
    let claim = put("/e/a", "1").when(Compare::absent("/e/a"));
    assert!(dcs.txn(claim).await?.succeeded);
    assert!(start.elapsed() < BOUNDED / 4, "it took {:?}", start.elapsed());
    let mut follow = dcs.follow("/e/");
    shows(&mut follow, RECOVERED, "the key", |view| view.keys.len() == 1).await;
    until(RECOVERED, "all members are known", || async {
        let known = dcs.endpoints();
        if known.len() == 4 { Ok(()) } else { Err(format!("{known:?}")) }
    })
    .await;
    etcd.kill_member(0);
    write(&dcs, "/e/b", "2").await;
    shows(&mut follow, RECOVERED, "both keys", |view| view.keys.len() == 2).await;
    etcd.passed();
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_frozen_member_delays_requests_and_hides_nothing() -> Result<()> {
    let mut etcd = Etcd::start(3).await?;
    let dcs = handle(etcd.endpoints());
    let others = handle(etcd.endpoints().split_off(1));
    let lease = dcs.grant(Duration::from_secs(20)).await?.lease;
    dcs.txn(Txn::just(Op::put_leased("/f/leader", "a", lease))).await?;
    dcs.keep_alive(lease).await?;
    let mut follow = dcs.follow("/f/");
    shows(&mut follow, RECOVERED, "the leader", |view| view.keys.len() == 1).await;
    // Nothing else may learn of the stall for this one: its first request meets it.
    let writer = handle(etcd.endpoints());
    writer.range("/f/").await?;

    etcd.freeze_member(0)?;
    let start = Instant::now();
    let answer = writer.txn(put("/f/w", "1")).await;
    assert!(start.elapsed() < BOUNDED, "{answer:?} took {:?}", start.elapsed());
    assert!(matches!(answer, Ok(_) | Err(DcsError::Unknown { .. })), "{answer:?}");
    write(&*others, "/f/hidden", "yes").await;
    let start = Instant::now();
    dcs.keep_alive(lease).await.context("a renewal goes to another member")?;
    assert!(start.elapsed() < BOUNDED, "the renewal took {:?}", start.elapsed());
    let start = Instant::now();
    dcs.range("/f/").await?;
    assert!(start.elapsed() < BOUNDED, "the read took {:?}", start.elapsed());
    let seen = |view: &kornak_dcs::View| view.get("/f/hidden").is_some();
    shows(&mut follow, SILENCE + BOUNDED, "what was written elsewhere", seen).await;

    etcd.thaw_member(0)?;
    write(&*dcs, "/f/thawed", "yes").await;
    let seen = |view: &kornak_dcs::View| view.get("/f/thawed").is_some();
    shows(&mut follow, RECOVERED, "what was written after", seen).await;
    etcd.passed();
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_quorum_nothing_is_answered_and_follows_say_so() -> Result<()> {
    let mut etcd = Etcd::start(3).await?;
    let dcs = handle(etcd.endpoints());
    write(&*dcs, "/q/a", "1").await;
    let mut follow = dcs.follow("/q/");
    shows(&mut follow, RECOVERED, "the key", |view| view.keys.len() == 1).await;

    etcd.freeze_member(1)?;
    etcd.freeze_member(2)?;
    let start = Instant::now();
    let check = Txn::default().when(Compare::Value { key: "/q/a".into(), value: "1".into() });
    let answer = dcs.txn(check).await;
    assert!(answer.is_err(), "one member alone cannot know: {answer:?}");
    until(SILENCE + BOUNDED, "the follow is lost", || {
        let view = follow.current();
        async move {
            if view.reach == Reach::Lost { Ok(()) } else { Err(format!("{:?}", view.reach)) }
        }
    })
    .await;
    println!("lost after {:?}", start.elapsed());
    assert_eq!(follow.current().keys.len(), 1, "what was seen last stays");
    let start = Instant::now();
    let read = dcs.range("/q/").await;
    assert!(read.is_err_and(|error| !matches!(error, DcsError::Denied { .. })));
    assert!(start.elapsed() < BOUNDED, "it took {:?}", start.elapsed());

    etcd.thaw_member(1)?;
    etcd.thaw_member(2)?;
    write(&*dcs, "/q/b", "2").await;
    shows(&mut follow, RECOVERED, "both keys", |view| view.keys.len() == 2).await;
    etcd.passed();
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_store_is_unreachable_and_known_to_have_done_nothing() -> Result<()> {
    let mut etcd = Etcd::start(1).await?;
    let dcs = handle(etcd.endpoints());
    let lease = dcs.grant(Duration::from_secs(60)).await?.lease;
    dcs.txn(Txn::just(Op::put_leased("/d/a", "1", lease))).await?;
    dcs.keep_alive(lease).await?;
    let mut follow = dcs.follow("/d/");
    let before = shows(&mut follow, RECOVERED, "the key", |view| view.keys.len() == 1).await;

    etcd.kill_all();
    until(SILENCE, "the follow is lost", || {
        let reach = follow.current().reach;
        async move { if reach == Reach::Lost { Ok(()) } else { Err(format!("{reach:?}")) } }
    })
    .await;
    let answer = dcs.txn(put("/d/b", "2").when(Compare::absent("/d/b"))).await;
    assert!(matches!(answer, Err(DcsError::Unreachable { .. })), "{answer:?}");
    let answer = dcs.keep_alive(lease).await;
    assert!(matches!(answer, Err(DcsError::Unreachable { .. })), "{answer:?}");

    etcd.start_all()?;
    let view = shows(&mut follow, RECOVERED, "the same store again", |_| true).await;
    assert_eq!((view.store, &view.keys), (before.store, &before.keys));
    dcs.keep_alive(lease).await.context("leases survive a restart")?;
    write(&*dcs, "/d/b", "2").await;
    shows(&mut follow, RECOVERED, "both keys", |view| view.keys.len() == 2).await;
    etcd.passed();
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_follow_that_slept_through_a_compaction_reads_anew() -> Result<()> {
    let mut etcd = Etcd::start(3).await?;
    let [first, rest @ ..] = &etcd.endpoints()[..] else { unreachable!("three were started") };
    let (cut, others) = (handle(vec![first.clone()]), handle(rest.to_vec()));
    write(&*others, "/c/old", "1").await;
    let mut follow = cut.follow("/c/");
    shows(&mut follow, RECOVERED, "the key", |view| view.keys.len() == 1).await;

    etcd.freeze_member(0)?;
    // The frozen member may have led: the first write waits for an election. An attempt of unknown
    // outcome may lie with the frozen member and be done when it thaws, so it writes elsewhere.
    write(&*others, "/elsewhere", "").await;
    others.txn(Txn::just(Op::delete("/c/old"))).await?;
    let mut last = Revision::NONE;
    for count in 0..20 {
        last = others.txn(put("/c/new", &count.to_string())).await?.revision;
    }
    until(SILENCE + BOUNDED, "the follow is lost", || {
        let reach = follow.current().reach;
        async move { if reach == Reach::Lost { Ok(()) } else { Err(format!("{reach:?}")) } }
    })
    .await;
    // The tool asks the first member, which has to catch up before it knows the revision.
    etcd.thaw_member(0)?;
    until(RECOVERED, "the compaction", || async {
        etcd.ctl(&["compaction", &last.to_string()]).await.map_err(|error| format!("{error:#}"))
    })
    .await;
    let view = shows(&mut follow, RECOVERED, "the new key", |view| view.revision >= last).await;
    assert_eq!(view.keys.len(), 1);
    assert_eq!(view.get("/c/new").map(|found| found.value.as_str()), Some("19"));
    etcd.passed();
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn users_are_let_in_by_their_password_alone() -> Result<()> {
    let mut etcd = Etcd::start(1).await?;
    for args in [
        &["user", "add", "root:secret"][..],
        &["user", "grant-role", "root", "root"],
        &["role", "add", "kornak"],
        &["role", "grant-permission", "kornak", "--prefix=true", "readwrite", "/mine/"],
        &["user", "add", "kornak:word"],
        &["user", "grant-role", "kornak", "kornak"],
        &["auth", "enable"],
    ] {
        etcd.ctl(args).await?;
    }
    let login = |password: &str| {
        let user = Some(("kornak".to_owned(), password.to_owned()));
        EtcdDcs::new(EtcdSettings { user, ..settings(etcd.endpoints()) })
    };
    let dcs = login("word");
    dcs.txn(put("/mine/a", "1")).await?;
    let mut follow = dcs.follow("/mine/");
    shows(&mut follow, RECOVERED, "the key", |view| view.keys.len() == 1).await;
    let lease = dcs.grant(Duration::from_secs(10)).await?.lease;
    dcs.keep_alive(lease).await?;
    for (sentence, answer) in [
        ("a foreign prefix", dcs.txn(put("/theirs", "1")).await),
        ("a wrong password", login("wrong").txn(put("/mine/a", "2")).await),
        ("no user", handle(etcd.endpoints()).txn(put("/mine/a", "2")).await),
    ] {
        assert!(matches!(answer, Err(DcsError::Denied { .. })), "{sentence}: {answer:?}");
    }
    // Changes of roles make old logins worthless, as a restart of etcd does.
    etcd.ctl(&["--user", "root:secret", "role", "add", "other"]).await?;
    dcs.txn(put("/mine/b", "2")).await?;
    etcd.kill_all();
    etcd.start_all()?;
    write(&dcs, "/mine/c", "3").await;
    shows(&mut follow, RECOVERED, "all keys", |view| view.keys.len() == 3).await;
    etcd.passed();
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_needs_the_right_authority_and_a_certificate_of_ours() -> Result<()> {
    let mut scratch = Scratch::new("etcd-tls");
    let (tls, foreign) = (authority(&scratch, "ours")?, authority(&scratch, "foreign")?);
    let mut etcd = Etcd::start_with_tls(tls.clone())?;
    let client = |ca: &TlsFiles, own: Option<&TlsFiles>| {
        EtcdDcs::new(EtcdSettings {
            tls: true,
            ca_file: Some(ca.ca.clone()),
            identity: own.map(|own| (own.certificate.clone(), own.key.clone())),
            retry_timeout: Duration::from_secs(2),
            ..settings(etcd.endpoints())
        })
    };
    let dcs = client(&tls, Some(&tls));
    write(&dcs, "/t/a", "1").await;
    let mut follow = dcs.follow("/t/");
    shows(&mut follow, RECOVERED, "the key", |view| view.keys.len() == 1).await;
    let answer = client(&foreign, Some(&tls)).txn(put("/t/a", "2")).await;
    assert!(matches!(answer, Err(DcsError::Unreachable { .. })), "{answer:?}");
    println!("foreign authority: {answer:?}");
    let answer = client(&tls, None).txn(put("/t/a", "2")).await;
    assert!(answer.is_err(), "{answer:?}");
    println!("no certificate: {answer:?}");
    assert_eq!(dcs.range("/t/").await?.get("/t/a").map(|a| a.value.clone()), Some("1".into()));
    etcd.passed();
    scratch.passed();
    Ok(())
}

/// An authority of its own with a certificate for 127.0.0.1, to be used on both sides.
fn authority(scratch: &Scratch, name: &str) -> Result<TlsFiles> {
    let dir = scratch.join(name);
    std::fs::create_dir_all(&dir)?;
    let files = TlsFiles {
        ca: dir.join("ca.pem"),
        certificate: dir.join("cert.pem"),
        key: dir.join("key.pem"),
    };
    let mut params = rcgen::CertificateParams::new(Vec::new())?;
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    params.distinguished_name.push(rcgen::DnType::CommonName, format!("authority {name}"));
    let ca_key = rcgen::KeyPair::generate()?;
    let ca = rcgen::CertifiedIssuer::self_signed(params, ca_key)?;
    let key = rcgen::KeyPair::generate()?;
    let mut params = rcgen::CertificateParams::new(vec!["127.0.0.1".to_owned()])?;
    params.extended_key_usages = vec![
        rcgen::ExtendedKeyUsagePurpose::ServerAuth,
        rcgen::ExtendedKeyUsagePurpose::ClientAuth,
    ];
    let certificate = params.signed_by(&key, &ca)?;
    std::fs::write(&files.ca, ca.pem())?;
    std::fs::write(&files.certificate, certificate.pem())?;
    std::fs::write(&files.key, key.serialize_pem())?;
    Ok(files)
}
