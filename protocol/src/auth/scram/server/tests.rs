use super::*;

/// RFC 7677 §3.
const CLIENT_NONCE: &str = "rOprNGfwEbeRWgbNEkqO";
const SERVER_NONCE: &str = "%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0";
const SALT: &str = "W22ZaJ0SNY7soEsUEjb6gQ==";
const CLIENT_LAST: &str = "c=biws,r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,\
                           p=dHzbZapWIk4jUhN+Ute9ytag9zjfMHgsqmmiz7AndVQ=";
const SERVER_LAST: &str = "v=6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4=";

/// PBKDF2 with one block (RFC 5802 §2.2, `Hi`).
fn salted(password: &[u8], salt: &[u8], iterations: u32) -> Key {
    let mut last = hmac(password, &[salt, &[0, 0, 0, 1]]);
    let mut all = last;
    for _ in 1..iterations {
        last = hmac(password, &[&last]);
        all = *xor(&all, &last);
    }
    all
}

fn pencil() -> Verifier {
    let salt = STANDARD.decode(SALT).unwrap();
    let salted = salted(b"pencil", &salt, 4096);
    let client_key = hmac(&salted, &[b"Client Key"]);
    let stored: Key = Sha256::digest(client_key).into();
    let text = format!(
        "SCRAM-SHA-256$4096:{SALT}${}:{}",
        STANDARD.encode(stored),
        STANDARD.encode(hmac(&salted, &[b"Server Key"]))
    );
    Verifier::parse(text.as_bytes()).unwrap()
}

fn server(binding: Binding) -> ScramServer {
    let mut server = ScramServer::new(pencil(), &[0; NONCE_BYTES], binding);
    server.nonce = SERVER_NONCE.to_owned();
    server
}

fn first(server: &mut ScramServer, mechanism: &str, message: &str) -> Result<String, Refusal> {
    let answer = server.on_first(mechanism.as_bytes(), message.as_bytes())?;
    Ok(String::from_utf8(answer).unwrap())
}

#[test]
fn the_exchange_of_rfc_7677_is_ours() {
    let mut s = server(Binding::None);
    let answer = first(&mut s, MECHANISM, &format!("n,,n=user,r={CLIENT_NONCE}")).unwrap();
    assert_eq!(answer, format!("r={CLIENT_NONCE}{SERVER_NONCE},s={SALT},i=4096"));
    let (answer, keys) = s.on_last(CLIENT_LAST.as_bytes()).unwrap();
    assert_eq!(answer, SERVER_LAST.as_bytes());
    assert!(keys.fit(&pencil()), "the proof reveals the ClientKey");
    let salt = STANDARD.decode(SALT).unwrap();
    let client_key = hmac(&salted(b"pencil", &salt, 4096), &[b"Client Key"]);
    assert_eq!(*keys.client_key, client_key);
}

#[test]
fn any_other_last_message_is_refused() {
    let altered = |from: &str, to: &str| CLIENT_LAST.replace(from, to);
    let rows = [
        (altered("p=d", "p=e"), Refusal::WrongPassword),
        (altered("c=biws", "c=eSws"), Refusal::Malformed("channel binding does not match")),
        (altered("c=biws", "c=biwsAA"), Refusal::Malformed("channel binding does not match")),
        (altered("$k0", "$k1"), Refusal::Malformed("nonce does not match")),
        (altered(SERVER_NONCE, ""), Refusal::Malformed("nonce does not match")),
        (altered(",p=", ",q="), Refusal::Malformed("no proof")),
        (altered("VQ=", "VQ=="), Refusal::Malformed("proof")),
        (altered("dHz", ""), Refusal::Malformed("proof")),
        (altered("c=biws,", ""), Refusal::Malformed("no channel binding")),
        (String::new(), Refusal::Malformed("no proof")),
        (CLIENT_LAST.repeat(40), Refusal::Malformed("client's last message")),
    ];
    for (message, refusal) in rows {
        let mut s = server(Binding::None);
        first(&mut s, MECHANISM, &format!("n,,n=user,r={CLIENT_NONCE}")).unwrap();
        assert_eq!(s.on_last(message.as_bytes()).unwrap_err(), refusal, "{message}");
        // One try only.
        let again = s.on_last(CLIENT_LAST.as_bytes()).unwrap_err();
        assert_eq!(again, Refusal::Malformed("message after the end"));
    }
}

#[test]
fn a_first_message_is_taken_or_refused() {
    let tls = || Binding::TlsServerEndPoint(vec![9; 32]);
    let plus = "SCRAM-SHA-256-PLUS";
    let bound = "p=tls-server-end-point";
    let rows: &[(Binding, &str, &str, bool)] = &[
        (Binding::None, MECHANISM, "n,,n=,r=abc", true),
        (Binding::None, MECHANISM, "y,,n=,r=abc", true),
        (Binding::None, MECHANISM, "n,,n=u,r=abc,x=ext", true),
        (tls(), MECHANISM, "n,,n=,r=abc", true),
        // The offer of channel binding was taken away in between.
        (tls(), MECHANISM, "y,,n=,r=abc", false),
        (Binding::None, MECHANISM, "p=tls-server-end-point,,n=,r=abc", false),
        (tls(), plus, "n,,n=,r=abc", false),
        (tls(), plus, "y,,n=,r=abc", false),
        (tls(), plus, "p=tls-unique,,n=,r=abc", false),
        (Binding::None, plus, "p=tls-server-end-point,,n=,r=abc", false),
        (Binding::None, "SCRAM-SHA-1", "n,,n=,r=abc", false),
        (Binding::None, "", "n,,n=,r=abc", false),
        (Binding::None, MECHANISM, "n,a=root,n=,r=abc", false),
        (Binding::None, MECHANISM, "n,,m=x,n=,r=abc", false),
        (Binding::None, MECHANISM, "n,,r=abc", false),
        (Binding::None, MECHANISM, "n,,n=", false),
        (Binding::None, MECHANISM, "n,,n=,r=", false),
        (Binding::None, MECHANISM, "n,,n=,r=a c", false),
        (Binding::None, MECHANISM, "n", false),
        (Binding::None, MECHANISM, "n,", false),
        (Binding::None, MECHANISM, "", false),
        (Binding::None, MECHANISM, "x,,n=,r=abc", false),
    ];
    for (binding, mechanism, message, good) in rows {
        let got = first(&mut server(binding.clone()), mechanism, message);
        assert_eq!(got.is_ok(), *good, "{mechanism} {message}: {got:?}");
    }
    let with_plus = first(&mut server(tls()), plus, &format!("{bound},,n=,r=abc"));
    assert!(with_plus.is_ok());
}

#[test]
fn a_message_longer_than_any_honest_one_is_refused() {
    // CVE-2026-6664
    for len in [MAX_SCRAM_NONCE_BYTES + 1, MAX_SCRAM_MESSAGE_BYTES, 1 << 20] {
        let message = format!("n,,n=,r={}", "a".repeat(len));
        assert!(first(&mut server(Binding::None), MECHANISM, &message).is_err(), "{len}");
    }
    let longest = format!("n,,n=,r={}", "a".repeat(MAX_SCRAM_NONCE_BYTES));
    assert!(first(&mut server(Binding::None), MECHANISM, &longest).is_ok());
}

#[test]
fn bytes_that_are_no_text_are_refused() {
    let mut s = server(Binding::None);
    assert!(s.on_first(MECHANISM.as_bytes(), b"n,,n=,r=\xff\xff").is_err());
}
