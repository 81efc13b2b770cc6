use pgwire::messages::{DecodeContext, PgWireBackendMessage};
use proptest::prelude::*;

use super::*;
use crate::frame::take_frame;

/// Reads what we wrote with a codec that is not ours.
fn theirs(out: &[u8]) -> PgWireBackendMessage {
    let mut buf = BytesMut::from(out);
    let mut context = DecodeContext::default();
    context.awaiting_frontend_ssl = false;
    context.awaiting_frontend_startup = false;
    let message = PgWireBackendMessage::decode(&mut buf, &context).unwrap().unwrap();
    assert!(buf.is_empty(), "one whole message and nothing more");
    message
}

fn body(out: &[u8]) -> &[u8] {
    assert_eq!(out[1..5], (out.len() as u32 - 1).to_be_bytes());
    &out[5..]
}

fn written(put: impl FnOnce(&mut BytesMut)) -> Vec<u8> {
    let mut out = BytesMut::new();
    put(&mut out);
    out.to_vec()
}

#[test]
fn what_we_write_another_codec_reads() {
    use PgWireBackendMessage as M;
    let auth = |put: &dyn Fn(&mut BytesMut)| theirs(&written(put));
    assert!(matches!(auth(&|o| put_authentication_ok(o)), M::Authentication(_)));
    assert!(matches!(auth(&|o| put_authentication_cleartext(o)), M::Authentication(_)));
    assert!(matches!(auth(&|o| put_authentication_md5([1; 4], o)), M::Authentication(_)));
    assert!(matches!(
        auth(&|o| put_ready_for_query(TransactionStatus::Failed, o)),
        M::ReadyForQuery(_)
    ));
    assert!(matches!(auth(&|o| put_parse_complete(o)), M::ParseComplete(_)));
    assert!(matches!(auth(&|o| put_bind_complete(o)), M::BindComplete(_)));
    assert!(matches!(auth(&|o| put_close_complete(o)), M::CloseComplete(_)));
    assert!(matches!(auth(&|o| put_empty_query_response(o)), M::EmptyQueryResponse(_)));
    assert!(matches!(auth(&|o| put_no_data(o)), M::NoData(_)));
    let M::CommandComplete(done) = auth(&|o| put_command_complete("ROLLBACK", o).unwrap()) else {
        panic!()
    };
    assert_eq!(done.tag, "ROLLBACK");
    let M::ParameterStatus(status) = auth(&|o| put_parameter_status(b"a", b"b", o).unwrap()) else {
        panic!()
    };
    assert_eq!((status.name.as_str(), status.value.as_str()), ("a", "b"));
    let M::RowDescription(rows) = auth(&|o| put_text_row_description(&["x", "y"], o).unwrap())
    else {
        panic!()
    };
    assert_eq!(rows.fields.len(), 2);
    assert_eq!((rows.fields[1].name.as_str(), rows.fields[1].type_id), ("y", 25));
    let M::DataRow(row) = auth(&|o| put_data_row(&[Some(b"v"), None], o).unwrap()) else {
        panic!()
    };
    assert_eq!(row.field_count, 2);
}

#[test]
fn authentication_messages_read_back() {
    let parse = |out: &[u8]| format!("{:?}", Authentication::parse(body(out)).unwrap());
    assert_eq!(parse(&written(put_authentication_ok)), "Ok");
    assert_eq!(parse(&written(put_authentication_cleartext)), "Cleartext");
    let md5 = written(|o| put_authentication_md5([1, 2, 3, 4], o));
    assert!(Authentication::parse(body(&md5)) == Ok(Authentication::Md5 { salt: [1, 2, 3, 4] }));
    let sasl = written(|o| put_authentication_sasl(&["A", "BC"], o).unwrap());
    let Ok(Authentication::Sasl(offered)) = Authentication::parse(body(&sasl)) else { panic!() };
    assert_eq!(offered.iter().collect::<Vec<_>>(), [&b"A"[..], b"BC"]);
    assert!(offered.contains("BC") && !offered.contains("B") && !offered.contains(""));
    let more = written(|o| put_authentication_sasl_continue(b"r=x", o));
    assert!(Authentication::parse(body(&more)) == Ok(Authentication::SaslContinue(b"r=x")));
    let last = written(|o| put_authentication_sasl_final(b"v=x", o));
    assert!(Authentication::parse(body(&last)) == Ok(Authentication::SaslFinal(b"v=x")));
    assert!(Authentication::parse(b"\0\0\0\x07") == Ok(Authentication::Other(7)));
}

#[test]
fn malformed_bodies_are_refused() {
    for bytes in [
        &b""[..],
        b"\0\0\0",
        b"\0\0\0\0x",
        b"\0\0\0\x05abc",
        b"\0\0\0\x05abcde",
        b"\0\0\0\x0a",
        b"\0\0\0\x0aSCRAM",
        b"\0\0\0\x0aSCRAM\0",
        b"\0\0\0\x0aSCRAM\0\0x",
    ] {
        assert!(Authentication::parse(bytes).is_err(), "{bytes:?}");
    }
    for bytes in [&b""[..], b"a", b"a\0", b"a\0b", b"a\0b\0c"] {
        assert!(parameter_status(bytes).is_err(), "{bytes:?}");
    }
    for bytes in [&b""[..], b"X", b"II"] {
        assert!(ready_for_query(bytes).is_err(), "{bytes:?}");
    }
    for bytes in [&b""[..], b"COMMIT", b"COMMIT\0x"] {
        assert!(command_complete(bytes).is_err(), "{bytes:?}");
    }
    for bytes in [&b""[..], b"\0\0\0\x01", b"\0\0\0\x01abc"] {
        assert!(BackendKey::parse(bytes).is_err(), "{bytes:?}");
    }
    for bytes in [&b""[..], b"\0", b"\0\x01", b"\0\x01\0\0\0\x02x", b"\0\0x", b"\xff\xff\0\0\0\0"] {
        assert!(data_row(bytes).is_err(), "{bytes:?}");
    }
    for bytes in [&b""[..], b"\0\0\0\x01a\0", b"\0\0\0\x01a\0b", b"\0\0\0\x01a\0b\0c"] {
        assert!(Notification::parse(bytes).is_err(), "{bytes:?}");
    }
    for bytes in [
        &b""[..],
        b"\0\x03\0\0",
        b"\0\x03\0\0\0\0\0\x01",
        b"\0\x03\0\0\xff\xff\xff\xffa\0",
        b"\0\x04\0\0\0\0\0\0",
        b"\0\x03\0\0\0\0\0\0x",
    ] {
        assert!(NegotiatedVersion::parse(bytes).is_err(), "{bytes:?}");
    }
}

#[test]
fn a_key_is_opaque_and_as_long_as_it_is() {
    for len in [4, 32, 256] {
        let key = BackendKey { pid: 42, key: Bytes::from(vec![9; len]) };
        let out = written(|o| key.put(o).unwrap());
        assert_eq!(BackendKey::parse(body(&out)), Ok(key.clone()));
        assert!(!format!("{key:?}").contains('9'));
    }
    for len in [0, 3, 257] {
        let key = BackendKey { pid: 42, key: Bytes::from(vec![9; len]) };
        assert_eq!(key.put(&mut BytesMut::new()), Err(EncodeError::KeyLength { len }));
    }
}

#[test]
fn a_notification_and_a_negotiation_are_read() {
    let n = Notification::parse(b"\0\0\0\x07chan\0pay\0").unwrap();
    assert_eq!((n.pid, n.channel, n.payload), (7, &b"chan"[..], &b"pay"[..]));
    for word in [b"\0\x03\0\x02", b"\0\0\0\x02"] {
        let v = [&word[..], b"\0\0\0\x01_pq_.x\0"].concat();
        let v = NegotiatedVersion::parse(&v).unwrap();
        assert_eq!((v.minor, v.unknown), (2, vec![&b"_pq_.x"[..]]));
    }
}

#[test]
fn a_nul_is_refused_and_nothing_of_the_message_stays() {
    let mut out = BytesMut::from(&b"before"[..]);
    assert!(put_parameter_status(b"a", b"b\0c", &mut out).is_err());
    assert!(put_command_complete("a\0b", &mut out).is_err());
    assert!(put_authentication_sasl(&["A", ""], &mut out).is_err());
    assert_eq!(&out[..], b"before");
}

proptest! {
    #[test]
    fn rows_read_back(values in prop::collection::vec(
        prop::option::of(prop::collection::vec(any::<u8>(), 0..20)), 0..10)
    ) {
        let values: Vec<Option<&[u8]>> = values.iter().map(Option::as_deref).collect();
        let mut out = BytesMut::new();
        put_data_row(&values, &mut out).unwrap();
        let frame = take_frame(&mut out, 4096).unwrap().unwrap();
        prop_assert_eq!(data_row(&frame.body).unwrap(), values);
    }

    #[test]
    fn no_bytes_break_a_view(input in prop::collection::vec(any::<u8>(), 0..200)) {
        fuzz_backend(&input);
        crate::error::fuzz_error_view(&input);
    }

    #[test]
    fn no_kind_of_authentication_breaks_a_view(
        kind in 0u32..16,
        rest in prop::collection::vec(prop_oneof![Just(0u8), any::<u8>()], 0..60),
    ) {
        fuzz_backend(&[&kind.to_be_bytes()[..], &rest].concat());
    }

    #[test]
    fn no_fields_break_the_view_of_an_error(
        fields in prop::collection::vec((any::<u8>(), "[A-Z0-9]{0,6}"), 0..80),
        cut in any::<prop::sample::Index>(),
    ) {
        let mut body: Vec<u8> = Vec::new();
        for (code, text) in fields {
            body.push(code);
            body.extend(text.bytes());
            body.push(0);
        }
        body.push(0);
        crate::error::fuzz_error_view(&body);
        crate::error::fuzz_error_view(&body[..cut.index(body.len())]);
    }
}
