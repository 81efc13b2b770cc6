use bytes::BytesMut;
use proptest::prelude::*;

use super::scram::MECHANISM_PLUS;
use super::*;
use crate::frame::take_frame;

/// `password` as PostgreSQL stores it, with a random salt.
fn stored(password: &str) -> StoredPassword {
    let text = postgres_protocol::password::scram_sha_256(password.as_bytes());
    StoredPassword::parse(text.as_bytes()).unwrap()
}

fn verifier(password: &str) -> Verifier {
    match stored(password) {
        StoredPassword::Scram(verifier) => verifier,
        StoredPassword::Md5(_) => panic!("not SCRAM"),
    }
}

fn password(text: &str) -> Credentials {
    Credentials::Password(Zeroizing::new(text.as_bytes().to_vec()))
}

#[derive(Debug)]
enum End {
    In(Credentials),
    Refused(Refusal),
    GaveUp(LoginError),
}

/// Lets the two sides talk until one has had enough.
fn talk(mut server: ServerAuth, mut client: ClientAuth) -> End {
    let mut to_client = BytesMut::new();
    server.request(&mut to_client).unwrap();
    let mut learnt = None;
    for _ in 0..8 {
        let mut to_server = BytesMut::new();
        while let Some(frame) = take_frame(&mut to_client, 4096).unwrap() {
            assert_eq!(frame.tag, b'R');
            match client.on(&Authentication::parse(&frame.body).unwrap()) {
                Step::Send(bytes) => to_server.extend_from_slice(&bytes),
                Step::Done { send, .. } => {
                    assert!(send.is_empty());
                    return End::In(learnt.expect("the server says Ok when it has learnt"));
                }
                Step::Refuse(error) => return End::GaveUp(error),
            }
        }
        let frame = take_frame(&mut to_server, 4096).unwrap().expect("the client answers");
        assert_eq!(frame.tag, b'p');
        match server.on(&frame.body) {
            Step::Send(bytes) => to_client.extend_from_slice(&bytes),
            Step::Done { send, learnt: got } => {
                to_client.extend_from_slice(&send);
                backend::put_authentication_ok(&mut to_client);
                learnt = Some(got);
            }
            Step::Refuse(refusal) => return End::Refused(refusal),
        }
    }
    panic!("endless");
}

fn scram(verifier: Verifier, binding: Binding) -> ServerAuth {
    ServerAuth::scram(verifier, [5; NONCE_BYTES], binding)
}

fn client(credentials: Credentials) -> ClientAuth {
    ClientAuth::new(b"ann", credentials, [6; NONCE_BYTES], Binding::None)
}

#[test]
fn keys_learnt_from_a_proof_log_in_elsewhere() {
    let v = verifier("pencil");
    let End::In(learnt) = talk(scram(v.clone(), Binding::None), client(password("pencil"))) else {
        panic!("the password is right");
    };
    let Credentials::Scram(keys) = &learnt else { panic!("{learnt:?}") };
    assert!(keys.fit(&v));
    let End::In(again) = talk(scram(v.clone(), Binding::None), client(learnt.clone())) else {
        panic!("the keys are right");
    };
    assert!(matches!(again, Credentials::Scram(keys) if keys.fit(&v)));
    // After ALTER ROLE … PASSWORD the salt is another one, and we say so before we prove.
    let changed = talk(scram(verifier("pencil"), Binding::None), client(learnt));
    assert!(matches!(changed, End::GaveUp(LoginError::OtherVerifier)), "{changed:?}");
}

#[test]
fn channel_binding_binds_both_sides_to_one_certificate() {
    let bound = |n: u8| Binding::TlsServerEndPoint(vec![n; 32]);
    let with =
        |credentials, binding| ClientAuth::new(b"ann", credentials, [6; NONCE_BYTES], binding);
    let v = verifier("pencil");
    let End::In(keys) = talk(scram(v.clone(), bound(1)), with(password("pencil"), bound(1))) else {
        panic!("same certificate");
    };
    assert!(matches!(talk(scram(v.clone(), bound(1)), with(keys.clone(), bound(1))), End::In(_)));
    // Somebody in the middle has another certificate.
    for credentials in [password("pencil"), keys.clone()] {
        let end = talk(scram(v.clone(), bound(1)), with(credentials, bound(2)));
        assert!(matches!(end, End::Refused(Refusal::Malformed(_))), "{end:?}");
    }
    // A client that cannot bind may still log in, a server that does not offer it too.
    for credentials in [password("pencil"), keys] {
        let plain = talk(scram(v.clone(), bound(1)), with(credentials.clone(), Binding::None));
        assert!(matches!(plain, End::In(_)), "{plain:?}");
        let unoffered = talk(scram(v.clone(), Binding::None), with(credentials, bound(1)));
        assert!(matches!(unoffered, End::In(_)), "{unoffered:?}");
    }
}

#[test]
fn a_role_that_does_not_exist_fails_like_a_wrong_password() {
    let wrong = talk(scram(verifier("pencil"), Binding::None), client(password("pen")));
    let mock = Verifier::mock(b"secret", b"nobody", 4096);
    let nobody = talk(scram(mock, Binding::None), client(password("pen")));
    let refusals = [wrong, nobody].map(|end| match end {
        End::Refused(refusal) => refusal,
        other => panic!("{other:?}"),
    });
    assert_eq!(refusals[0], refusals[1]);
    assert_eq!(refusals[0].sqlstate(), INVALID_PASSWORD);
    let fields = refusals[0].fields(b"nobody");
    assert_eq!(fields.message, "password authentication failed for user \"nobody\"");
}

#[test]
fn a_made_up_verifier_is_the_same_each_time_and_differs_by_role() {
    let ask = |secret: &[u8], user: &[u8]| {
        let mut server =
            ScramServer::new(Verifier::mock(secret, user, 4096), &[0; 18], Binding::None);
        server.on_first(b"SCRAM-SHA-256", b"n,,n=,r=abc").unwrap()
    };
    assert_eq!(ask(b"s", b"u"), ask(b"s", b"u"));
    assert_ne!(ask(b"s", b"u"), ask(b"s", b"v"));
    assert_ne!(ask(b"s", b"u"), ask(b"t", b"u"));
    let text = String::from_utf8(ask(b"s", b"u")).unwrap();
    let salt = text.split(",s=").nth(1).unwrap().split(',').next().unwrap();
    assert_eq!(salt.len(), 24, "16 bytes, as PostgreSQL's own");
}

#[test]
fn md5_works_on_both_sides_and_its_hash_travels() {
    let secret = Md5Secret::of(b"ann", b"pencil");
    let server =
        |secret: &Md5Secret| ServerAuth::Md5 { secret: secret.clone(), salt: [1, 2, 3, 4] };
    let End::In(learnt) = talk(server(&secret), client(password("pencil"))) else {
        panic!("the password is right");
    };
    assert!(matches!(learnt, Credentials::Md5(_)));
    assert!(matches!(talk(server(&secret), client(learnt)), End::In(_)));
    for (secret, text) in [(secret, "pen"), (Md5Secret::mock(b"s", b"ann"), "pencil")] {
        let end = talk(server(&secret), client(password(text)));
        assert!(matches!(end, End::Refused(Refusal::WrongPassword)), "{end:?}");
    }
}

#[test]
fn md5_answers_are_postgresqls() {
    let stored = b"md53175bce1d3201d16594cebf9d7eb3f9d"; // md5('postgres' || 'postgres')
    let secret = Md5Secret::parse(stored).unwrap();
    assert_eq!(secret, Md5Secret::of(b"postgres", b"postgres"));
    let salt = [0x2a, 0x3d, 0x8f, 0xe0];
    let theirs = postgres_protocol::authentication::md5_hash(b"postgres", b"postgres", salt);
    assert_eq!(secret.answer(salt), theirs.as_bytes());
}

#[test]
fn a_clear_password_is_compared_with_whatever_is_stored() {
    let rows = [
        (stored("pencil"), "pencil", true),
        (stored("pencil"), "pencils", false),
        (stored("I\u{00AD}X"), "IX", true), // SASLprep maps the soft hyphen to nothing
        (stored("x\u{7}"), "x\u{7}", true), // prohibited by SASLprep: taken as it is
        (StoredPassword::Md5(Md5Secret::of(b"ann", b"pencil")), "pencil", true),
        (StoredPassword::Md5(Md5Secret::of(b"ann", b"pencil")), "pen", false),
        (StoredPassword::Md5(Md5Secret::of(b"ann", b"")), "", false),
        (StoredPassword::Md5(Md5Secret::mock(b"s", b"ann")), "pencil", false),
        (StoredPassword::Scram(Verifier::mock(b"s", b"ann", 4096)), "pencil", false),
    ];
    for (stored, text, good) in rows {
        let server = ServerAuth::Cleartext { user: b"ann".to_vec(), stored };
        let end = talk(server, client(password(text)).allow(ANYTHING));
        assert_eq!(matches!(end, End::In(Credentials::Password(_))), good, "{text}: {end:?}");
    }
}

#[test]
fn a_password_is_not_sent_in_clear_unless_allowed() {
    let stored = stored("pencil");
    let server = ServerAuth::Cleartext { user: b"ann".to_vec(), stored };
    let end = talk(server, client(password("pencil")));
    assert!(matches!(end, End::GaveUp(LoginError::Forbidden { .. })), "{end:?}");
}

const ANYTHING: Allowed = Allowed { cleartext: true, ..Allowed::USUAL };

#[test]
fn a_login_proves_itself_only_as_it_may() {
    let md5 = || ServerAuth::Md5 { secret: Md5Secret::of(b"ann", b"pencil"), salt: [1; 4] };
    let clear = || ServerAuth::Cleartext { user: b"ann".to_vec(), stored: stored("pencil") };
    let sasl = || scram(verifier("pencil"), Binding::None);
    let allowed = Allowed { md5: false, nothing: false, ..Allowed::USUAL };
    for (server, is_in) in [(md5(), false), (clear(), false), (sasl(), true)] {
        let end = talk(server, client(password("pencil")).allow(allowed));
        assert_eq!(matches!(end, End::In(_)), is_in, "{end:?}");
        let forbidden = matches!(end, End::GaveUp(LoginError::Forbidden { .. }));
        assert_eq!(forbidden, !is_in, "{end:?}");
    }
    let none = Allowed { scram: false, ..allowed };
    let end = talk(sasl(), client(password("pencil")).allow(none));
    assert!(matches!(end, End::GaveUp(LoginError::Forbidden { .. })), "{end:?}");
    let step = client(password("pencil")).allow(allowed).on(&Authentication::Ok);
    assert!(matches!(step, Step::Refuse(LoginError::Forbidden { .. })), "{step:?}");
}

#[test]
fn credentials_answer_only_what_they_can() {
    let md5 = || Credentials::Md5(Md5Secret::of(b"ann", b"pencil"));
    let sasl = || scram(verifier("pencil"), Binding::None);
    let md5_server = || ServerAuth::Md5 { secret: Md5Secret::of(b"ann", b"pencil"), salt: [1; 4] };
    let keys = || Credentials::Scram(ScramKeys::for_fuzzing());
    for (server, credentials) in [
        (sasl(), md5()),
        (sasl(), Credentials::None),
        (md5_server(), keys()),
        (md5_server(), Credentials::None),
    ] {
        let end = talk(server, client(credentials).allow(ANYTHING));
        assert!(matches!(end, End::GaveUp(LoginError::NoCredentials { .. })), "{end:?}");
    }
}

fn offer(mechanisms: &[&str]) -> Vec<u8> {
    let mut out = BytesMut::new();
    backend::put_authentication_sasl(mechanisms, &mut out).unwrap();
    take_frame(&mut out, 4096).unwrap().unwrap().body.to_vec()
}

#[test]
fn a_server_is_not_believed_without_its_own_proof() {
    for credentials in [password("pencil"), Credentials::Scram(ScramKeys::for_fuzzing())] {
        let mut c = client(credentials);
        let body = offer(&["SCRAM-SHA-256"]);
        assert!(matches!(c.on(&Authentication::parse(&body).unwrap()), Step::Send(_)));
        // "You are in", without having shown that it knows the verifier.
        let step = c.on(&Authentication::Ok);
        assert!(matches!(step, Step::Refuse(LoginError::Malformed(_))), "{step:?}");
    }
}

#[test]
fn hostile_first_messages_of_a_server_are_refused() {
    let ours = base64::Engine::encode(&base64::prelude::BASE64_STANDARD, [6; NONCE_BYTES]);
    let rows = [
        // CVE-2026-42198 and the like: years of PBKDF2. (Keys need no rounds, but the count
        // is then another verifier's.)
        format!("r={ours}x,s=c2FsdA==,i=4294967295"),
        format!("r={ours}x,s=c2FsdA==,i=2147483647"),
        format!("r={ours}x,s=c2FsdA==,i=0"),
        format!("r={ours}x,s=c2FsdA==,i=-1"),
        format!("r={ours}x,s=,i=4096"),
        format!("r={ours}x,s=!!!!,i=4096"),
        format!("r={ours}x,i=4096"),
        format!("r={ours},s=c2FsdA==,i=1"), // adds nothing of its own
        "r=other,s=c2FsdA==,i=1".to_owned(), // does not extend ours
        "e=other-error".to_owned(),
        String::new(),
        format!("r={ours}{},s=c2FsdA==,i=1", "x".repeat(1 << 16)), // CVE-2026-6665
    ];
    for message in rows {
        for credentials in [password("pencil"), Credentials::Scram(ScramKeys::for_fuzzing())] {
            let mut c = client(credentials);
            let body = offer(&["SCRAM-SHA-256"]);
            assert!(matches!(c.on(&Authentication::parse(&body).unwrap()), Step::Send(_)));
            let step = c.on(&Authentication::SaslContinue(message.as_bytes()));
            assert!(matches!(step, Step::Refuse(_)), "{message}: {step:?}");
        }
    }
}

#[test]
fn hostile_last_messages_of_a_server_are_refused() {
    let v = verifier("pencil");
    let End::In(keys) = talk(scram(v.clone(), Binding::None), client(password("pencil"))) else {
        panic!("the password is right");
    };
    let wrong = format!("v={}", "A".repeat(43) + "=");
    let long = format!("v={}", "A".repeat(100_000)); // CVE-2026-6665
    for last in ["e=invalid-proof", "v=", "", "x", wrong.as_str(), long.as_str()] {
        for credentials in [keys.clone(), password("pencil")] {
            let mut server = scram(v.clone(), Binding::None);
            let mut c = client(credentials);
            let body = offer(&["SCRAM-SHA-256"]);
            let Step::Send(first) = c.on(&Authentication::parse(&body).unwrap()) else { panic!() };
            let Step::Send(challenge) = server.on(&first[5..]) else { panic!() };
            let challenge = Authentication::parse(&challenge[5..]).unwrap();
            assert!(matches!(c.on(&challenge), Step::Send(_)));
            let step = c.on(&Authentication::SaslFinal(last.as_bytes()));
            assert!(matches!(step, Step::Refuse(_)), "{last}: {step:?}");
        }
    }
}

#[test]
fn what_a_server_offers_decides_the_mechanism() {
    let mechanism = |offered: &[&str], binding: Binding| {
        let mut c = ClientAuth::new(b"u", password("p"), [6; NONCE_BYTES], binding);
        let body = offer(offered);
        match c.on(&Authentication::parse(&body).unwrap()) {
            Step::Send(bytes) => {
                let initial = frontend::SaslInitialResponse::parse(&bytes[5..]).unwrap();
                Ok(String::from_utf8(initial.mechanism.to_vec()).unwrap())
            }
            Step::Refuse(error) => Err(error),
            Step::Done { .. } => panic!("too early"),
        }
    };
    let bound = || Binding::TlsServerEndPoint(vec![1; 32]);
    let both = &[MECHANISM_PLUS, scram::MECHANISM][..];
    assert_eq!(mechanism(both, bound()).unwrap(), MECHANISM_PLUS);
    assert_eq!(mechanism(both, Binding::None).unwrap(), scram::MECHANISM);
    assert_eq!(mechanism(&[scram::MECHANISM], bound()).unwrap(), scram::MECHANISM);
    assert_eq!(mechanism(&["OAUTHBEARER"], bound()), Err(LoginError::NoMechanism));
    assert_eq!(mechanism(&[], Binding::None), Err(LoginError::NoMechanism));
}

#[test]
fn methods_that_are_not_served_are_named() {
    let step = client(password("p")).on(&Authentication::Other(7));
    assert!(matches!(step, Step::Refuse(LoginError::UnknownMethod(7))), "{step:?}");
}

#[test]
fn stored_passwords_are_told_apart_and_bad_ones_refused() {
    let good = postgres_protocol::password::scram_sha_256(b"x");
    assert!(StoredPassword::parse(good.as_bytes()).is_ok());
    let rows = [
        "".to_owned(),
        "pencil".to_owned(),
        "md5".to_owned(),
        "md5zz75bce1d3201d16594cebf9d7eb3f9d".to_owned(),
        "md53175bce1d3201d16594cebf9d7eb3f9d0".to_owned(),
        "SCRAM-SHA-256$4096:abc".to_owned(),
        "SCRAM-SHA-256$".to_owned(),
        "SCRAM-SHA-1$".to_owned() + &good[14..],
        good.replace("4096", "0"),
        good.replace("4096", "-5"),
        good.replace("4096", "99999999999"),
        good.replace("4096", ""),
        good.clone() + "AAAA",
        good[..good.len() - 4].to_owned(),
        good.replace(':', ";"),
        good.clone() + &"A".repeat(10_000),
    ];
    for text in rows {
        assert_eq!(StoredPassword::parse(text.as_bytes()), Err(UnknownPasswordFormat), "{text}");
    }
}

#[test]
fn secrets_do_not_print() {
    let v = verifier("pencil");
    let End::In(keys) = talk(scram(v.clone(), Binding::None), client(password("pencil"))) else {
        panic!("the password is right");
    };
    assert_eq!(format!("{keys:?}"), "Scram");
    assert_eq!(format!("{:?}", password("pencil")), "Password");
    assert_eq!(format!("{v:?}"), "Verifier { iterations: 4096, .. }");
    assert_eq!(format!("{:?}", Md5Secret::of(b"a", b"b")), "Md5Secret");
    let auth = scram(v, Binding::None);
    assert!(!format!("{auth:?}").contains("salt"), "{auth:?}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn no_bytes_let_a_client_in(input in prop::collection::vec(any::<u8>(), 0..300)) {
        fuzz_server_auth(&input);
    }

    #[test]
    fn no_damage_lets_a_client_in(
        cut in any::<u8>(),
        damage in prop::collection::vec((0usize..160, any::<u8>()), 0..4),
    ) {
        let mut text = vec![cut];
        text.extend(b"SCRAM-SHA-256\0\0\0\0\x20n,,n=user,r=rOprNGfwEbeRWgbNEkqO");
        let first = text.len() - 1;
        text.extend(b"c=biws,r=rOprNGfwEbeRWgbNEkqOAQEBAQEBAQEBAQEBAQEBAQEB,");
        text.extend(b"p=dHzbZapWIk4jUhN+Ute9ytag9zjfMHgsqmmiz7AndVQ=");
        for (at, byte) in damage {
            let len = text.len();
            text[at % len] = byte;
        }
        fuzz_server_auth(&text);
        text[0] = first as u8;
        fuzz_server_auth(&text);
    }

    #[test]
    fn no_bytes_make_a_server_credible(
        input in prop::collection::vec(any::<u8>(), 0..300),
        iterations in 1u32..8,
    ) {
        fuzz_client_auth(&input);
        let ours = "AQEBAQEBAQEBAQEBAQEBAQEB";
        let first = format!("r={ours}zz,s=c2FsdA==,i={iterations}");
        let mut text = vec![first.len() as u8];
        text.extend(first.bytes());
        text.extend(&input);
        fuzz_client_auth(&text);
    }
}
