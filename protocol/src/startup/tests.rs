use proptest::prelude::*;

use super::*;

fn packet(body: &[u8]) -> BytesMut {
    let mut buf = BytesMut::new();
    buf.put_u32(4 + body.len() as u32);
    buf.put_slice(body);
    buf
}

fn session(params: &[u8]) -> Result<Option<Startup>, StartupError> {
    take_startup(&mut packet(&[b"\0\x03\0\0", params].concat()))
}

fn message(params: &[u8]) -> StartupMessage {
    match session(params) {
        Ok(Some(Startup::Session(message))) => message,
        other => panic!("{other:?}"),
    }
}

#[test]
fn parameters_keep_their_order_their_bytes_and_their_duplicates() {
    let m = message(b"user\0k\xe4te\0search_path\0a\0search_path\0b\0\0");
    let params: Vec<_> = m.params().collect();
    assert_eq!(
        params,
        [
            (&b"user"[..], &b"k\xe4te"[..]),
            (&b"search_path"[..], &b"a"[..]),
            (&b"search_path"[..], &b"b"[..])
        ]
    );
    assert_eq!(m.get("search_path"), Some(&b"b"[..]));
    assert_eq!(m.database(), Some(&b"k\xe4te"[..]));
}

#[test]
fn what_breaks_the_format_is_refused() {
    for params in
        [&b""[..], b"user", b"user\0", b"user\0x", b"user\0x\0", b"user\0x\0\0more", b"\0\0"]
    {
        let got = session(params);
        assert!(matches!(got, Err(StartupError::Malformed(_))), "{params:?}: {got:?}");
    }
    assert!(session(b"\0").is_ok(), "no parameters at all is well formed");
}

#[test]
fn a_length_is_judged_before_anything_is_waited_for() {
    for len in [0u32, 3, 4, 7, 10_005, 0x7fff_ffff, u32::MAX] {
        let mut buf = BytesMut::from(&len.to_be_bytes()[..]);
        assert_eq!(take_startup(&mut buf), Err(StartupError::Length { len }));
    }
    let mut buf = BytesMut::from(&10_004u32.to_be_bytes()[..]);
    assert_eq!(take_startup(&mut buf), Ok(None));
}

#[test]
fn the_longest_packet_is_taken() {
    let value = vec![b'x'; MAX_STARTUP_BYTES - 4 - b"user\0".len() - 2];
    let mut out = BytesMut::new();
    put_startup(ProtocolVersion::V3_0, [(&b"user"[..], &value[..])], &mut out).unwrap();
    assert_eq!(out.len(), MAX_STARTUP_BYTES + 4);
    assert!(matches!(take_startup(&mut out), Ok(Some(Startup::Session(_)))));
    let longer = [&value[..], b"x"].concat();
    let refused = put_startup(ProtocolVersion::V3_0, [(&b"user"[..], &longer[..])], &mut out);
    assert_eq!(refused, Err(EncodeError::TooLong));
    assert!(out.is_empty());
}

#[test]
fn requests_without_a_session_are_told_apart() {
    let mut buf = BytesMut::new();
    put_ssl_request(&mut buf);
    put_gssenc_request(&mut buf);
    put_cancel_request(7, &[9; 256], &mut buf).unwrap();
    buf.put_u8(b'!');
    assert_eq!(take_startup(&mut buf), Ok(Some(Startup::Ssl)));
    assert_eq!(take_startup(&mut buf), Ok(Some(Startup::GssEnc)));
    let cancel = CancelRequest { pid: 7, key: Bytes::from_static(&[9; 256]) };
    assert_eq!(take_startup(&mut buf), Ok(Some(Startup::Cancel(cancel))));
    assert_eq!(&buf[..], b"!", "bytes behind a packet stay");
}

#[test]
fn a_cancel_key_has_four_to_256_bytes() {
    let mut out = BytesMut::new();
    for (len, good) in [(0, false), (3, false), (4, true), (32, true), (256, true), (257, false)] {
        let key = vec![1; len];
        assert_eq!(put_cancel_request(1, &key, &mut out).is_ok(), good, "{len}");
        let body = [&CANCEL_CODE.to_be_bytes()[..], &[0, 0, 0, 1], &key].concat();
        assert_eq!(take_startup(&mut packet(&body)).is_ok(), good, "{len}");
    }
}

#[test]
fn a_request_with_a_body_it_must_not_have_is_refused() {
    for code in [SSL_CODE, GSSENC_CODE] {
        let body = [&code.to_be_bytes()[..], b"x"].concat();
        assert!(take_startup(&mut packet(&body)).is_err());
    }
}

#[test]
fn other_major_versions_are_refused_by_name() {
    for (word, major, minor) in [(0x0002_0000u32, 2, 0), (0x0004_0000, 4, 0), (0, 0, 0)] {
        let got = take_startup(&mut packet(&word.to_be_bytes()));
        assert_eq!(got, Err(StartupError::Version(ProtocolVersion { major, minor })));
    }
}

#[test]
fn grease_is_negotiated_down_and_its_option_named() {
    let body = b"\0\x03\x27\x0fuser\0u\0_pq_.test_protocol_negotiation\0\0\0";
    let Ok(Some(Startup::Session(m))) = take_startup(&mut packet(body)) else { panic!() };
    assert_eq!(m.version, ProtocolVersion { major: 3, minor: 9999 });
    let told = m.negotiate(2);
    assert!(told.must_tell());
    let mut out = BytesMut::new();
    told.put(&mut out).unwrap();
    assert_eq!(&out[..], b"v\0\0\0\x2b\0\x03\0\x02\0\0\0\x01_pq_.test_protocol_negotiation\0");
}

#[test]
fn what_is_served_is_not_negotiated() {
    let plain = message(b"user\0u\0\0");
    assert!(!plain.negotiate(2).must_tell());
    assert_eq!(plain.negotiate(2).version, ProtocolVersion::V3_0);
    let newer = StartupMessage { version: ProtocolVersion::V3_2, ..plain };
    assert!(!newer.negotiate(2).must_tell());
    assert!(newer.negotiate(0).must_tell());
}

#[test]
fn a_patch_replaces_removes_and_adds_in_place() {
    let m = message(b"user\0u\0database\0d\0application_name\0a\0application_name\0b\0x\0y\0\0");
    let mut out = BytesMut::new();
    let changes: &[(&str, Option<&[u8]>)] =
        &[("application_name", Some(b"k")), ("x", None), ("client_encoding", Some(b"UTF8"))];
    m.put_patched(ProtocolVersion::V3_0, changes, &mut out).unwrap();
    let Ok(Some(Startup::Session(patched))) = take_startup(&mut out) else { panic!() };
    let params: Vec<_> = patched.params().collect();
    assert_eq!(
        params,
        [
            (&b"user"[..], &b"u"[..]),
            (&b"database"[..], &b"d"[..]),
            (&b"application_name"[..], &b"k"[..]),
            (&b"client_encoding"[..], &b"UTF8"[..])
        ]
    );
}

#[test]
fn a_value_with_a_nul_cannot_smuggle_a_parameter() {
    let mut out = BytesMut::new();
    let params = [(&b"user"[..], &b"u\0search_path\0evil"[..])];
    assert_eq!(
        put_startup(ProtocolVersion::V3_0, params, &mut out),
        Err(EncodeError::NulInString { what: "parameter value" })
    );
    assert!(out.is_empty());
}

#[test]
fn replication_is_read_as_a_server_reads_it() {
    let check = |words: &[&str], expected: Result<Replication, &str>| {
        let all: String = words.iter().map(|word| format!("replication\0{word}\0")).collect();
        let m = message(format!("user\0u\0{all}\0").as_bytes());
        assert_eq!(m.replication(), expected.map_err(str::as_bytes), "{words:?}");
    };
    for word in ["t", "tr", "TRUE", "y", "Yes", "on", "ON", "1"] {
        check(&[word], Ok(Replication::Physical));
    }
    for word in ["f", "fa", "fal", "FALS", "false", "n", "no", "of", "OFF", "0"] {
        check(&[word], Ok(Replication::None));
    }
    check(&["database"], Ok(Replication::Logical));
    for word in ["", "o", "maybe", "truee", "offf", "01", "Database", "databas", " on", "-1"] {
        check(&[word], Err(word));
    }
    // The last one counts, a wrong one is wrong wherever it stands, `database` stays said.
    check(&["true", "off"], Ok(Replication::None));
    check(&["off", "true"], Ok(Replication::Physical));
    check(&["database", "yes"], Ok(Replication::Logical));
    check(&["database", "no"], Ok(Replication::None));
    check(&["maybe", "on"], Err("maybe"));
    check(&[], Ok(Replication::None));
}

#[test]
fn names_are_cut_where_older_servers_cut_them() {
    let long = "x".repeat(62);
    let packet = format!("user\0{long}äyz\0application_name\0{long}abc\0database\0{long}ab\0\0");
    let m = message(packet.as_bytes());
    assert!(m.has_long_names());
    let short = m.with_short_names();
    // In the middle of a letter, if it falls there.
    assert_eq!(short.user(), Some(&[long.as_bytes(), b"\xc3"].concat()[..]));
    assert_eq!(short.database(), Some(format!("{long}a").as_bytes()));
    assert_eq!(short.get("application_name").map(<[u8]>::len), Some(65));
    let m = message(format!("user\0{long}a\0\0").as_bytes());
    assert!(!m.has_long_names());
    assert_eq!(m.clone().with_short_names(), m);
}

#[test]
fn a_cancel_key_is_not_printed() {
    let cancel = CancelRequest { pid: 7, key: Bytes::from_static(b"secret") };
    assert!(!format!("{cancel:?}").contains("115"), "{cancel:?}");
}

proptest! {
    #[test]
    fn any_parameters_survive_the_wire(
        params in prop::collection::vec(("[^\0]{1,12}", "[^\0]{0,20}"), 0..20),
        minor in 0u16..4,
    ) {
        let version = ProtocolVersion { major: 3, minor };
        let pairs = || params.iter().map(|(n, v)| (n.as_bytes(), v.as_bytes()));
        let mut out = BytesMut::new();
        put_startup(version, pairs(), &mut out).unwrap();
        let Ok(Some(Startup::Session(m))) = take_startup(&mut out) else { panic!() };
        prop_assert_eq!(m.version, version);
        prop_assert!(m.params().eq(pairs()));
    }

    #[test]
    fn a_packet_that_is_not_whole_is_waited_for(cut in 0usize..20) {
        let mut out = BytesMut::new();
        put_startup(ProtocolVersion::V3_0, [(&b"user"[..], &b"somebody"[..])], &mut out).unwrap();
        out.truncate(cut.min(out.len() - 1));
        prop_assert_eq!(take_startup(&mut out), Ok(None));
    }

    #[test]
    fn no_bytes_break_the_parser(input in prop::collection::vec(any::<u8>(), 0..200)) {
        fuzz_take_startup(&input);
    }

    #[test]
    fn no_damage_breaks_the_parser(
        code in prop::sample::select(vec![196_608u32, 196_610, CANCEL_CODE, SSL_CODE, GSSENC_CODE]),
        body in prop::collection::vec(prop_oneof![Just(0u8), any::<u8>()], 0..60),
        off in -2i32..3,
    ) {
        let len = (8 + body.len() as i32 + off) as u32;
        fuzz_take_startup(&[&len.to_be_bytes()[..], &code.to_be_bytes(), &body].concat());
    }
}
