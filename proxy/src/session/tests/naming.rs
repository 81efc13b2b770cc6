//! The `application_name` that a client of a pool is told.

use kornak_protocol::params::Parameters;

use super::*;
use crate::session::pooled::ConnectionState;

/// ParameterStatus of the name.
fn says(play: &mut Play, value: &str) -> Option<String> {
    let heard = play.server(|out| {
        be::put_parameter_status(b"application_name", value.as_bytes(), out).unwrap();
    });
    let mut edited = play.0.take_edited();
    match heard[..] {
        [Heard::Pass] => Some(value.to_owned()),
        [Heard::Swallow] => None,
        [Heard::Edited] => {
            let frame = take_frame(&mut edited, 1 << 20).unwrap().unwrap();
            let (_, value) = be::parameter_status(&frame.body).unwrap();
            Some(String::from_utf8_lossy(value).into_owned())
        }
        _ => panic!("{heard:?}"),
    }
}

fn of(name: &str) -> Parameters {
    let mut params = Parameters::default();
    params.set(b"application_name", name.as_bytes()).unwrap();
    params
}

/// A session of an application `mine` on a connection on which that is set.
fn mine() -> (Play, ConnectionState) {
    let base =
        vec![(Box::from(&b"application_name"[..]), b"SET application_name = E'mine'"[..].into())];
    let mut state = ConnectionState::fresh(of("").into());
    let mut play = Play(Session::pooled(Arc::new(of("mine")), 2, base));
    assert!(!play.0.attach(&mut state, &mut BytesMut::new()));
    play.0.put_fit(&state, &mut BytesMut::new());
    state.params = of("mine").into();
    play.0.made_fit(&mut state);
    assert!(play.0.attach(&mut state, &mut BytesMut::new()));
    (play, state)
}

#[test]
fn a_reset_leads_back_to_the_name_of_the_login() {
    let (mut play, mut state) = mine();
    play.query("DISCARD ALL").complete("DISCARD ALL");
    assert_eq!(says(&mut play, ""), None, "nothing has changed for the client");
    play.ready(Idle);
    play.0.detach(&mut state);
    assert_eq!(state.params.get("application_name"), Some(&b""[..]), "what the server has said");

    let (mut play, mut state) = mine();
    play.query("SET application_name = 'else'").complete("SET");
    assert_eq!(says(&mut play, "else"), Some("else".to_owned()));
    play.ready(Idle);
    play.query("RESET ALL").complete("RESET");
    assert_eq!(says(&mut play, ""), Some("mine".to_owned()));
    play.ready(Idle);
    play.0.detach(&mut state);
    assert_eq!(state.params.get("application_name"), Some(&b""[..]));
}

#[test]
fn a_reset_that_is_rolled_back_was_none() {
    let (mut play, _) = mine();
    play.done("BEGIN", "BEGIN", InBlock);
    play.query("RESET application_name").complete("RESET");
    assert_eq!(says(&mut play, ""), None);
    play.ready(InBlock).query("ROLLBACK").complete("ROLLBACK");
    assert_eq!(says(&mut play, "mine"), None, "the client knows that");
    play.ready(Idle);
    play.query("BEGIN; RESET ALL; SET application_name = 'x'").complete("BEGIN").complete("RESET");
    play.complete("SET");
    assert_eq!(says(&mut play, "x"), Some("x".to_owned()));
}

#[test]
fn an_empty_name_that_was_set_is_one() {
    let (mut play, _) = mine();
    play.query("SET application_name = ''").complete("SET");
    assert_eq!(says(&mut play, ""), Some(String::new()));
    play.ready(Idle).query("SELECT set_config('application_name', '', false)").complete("SELECT 1");
    let mut play = Play(Session::pooled(Arc::new(of("")), 2, Vec::new()));
    play.query("DISCARD ALL").complete("DISCARD ALL");
    assert_eq!(says(&mut play, "of the server"), Some("of the server".to_owned()));
}
