use proptest::prelude::*;

use super::*;

fn message(tag: u8, body: &[u8]) -> Vec<u8> {
    let mut out = vec![tag];
    out.extend((body.len() as u32 + 4).to_be_bytes());
    out.extend(body);
    out
}

/// A message as a test compares it: tag, length word, shown body.
type Shown = (u8, u32, Vec<u8>);

/// Everything that is shown of a stream in chunks, and where each message began in the stream.
fn shown(direction: Direction, chunks: &[&[u8]]) -> Result<Vec<(Shown, usize)>, FrameError> {
    let mut scanner = Scanner::new(direction);
    let mut all = Vec::new();
    let mut fed = 0;
    let mut unshown = 0;
    for chunk in chunks {
        let n = scanner.scan(chunk, |seen| {
            let begin = seen.start.map_or(fed - unshown, |at| fed + at);
            if let Some(end) = seen.end {
                assert_eq!(begin + 1 + seen.len as usize, fed + end);
            } else {
                assert!(begin + 1 + seen.len as usize > fed + chunk.len());
            }
            all.push(((seen.tag, seen.len, seen.body.to_vec()), begin));
            Flow::Pass
        })?;
        assert_eq!(n, chunk.len());
        fed += chunk.len();
        unshown = scanner.unshown();
    }
    assert_eq!(scanner.at_boundary(), scanner.remaining() == 0 && scanner.unshown() == 0);
    Ok(all)
}

fn tags(direction: Direction, stream: &[u8]) -> Result<Vec<u8>, FrameError> {
    Ok(shown(direction, &[stream])?.into_iter().map(|((tag, ..), _)| tag).collect())
}

#[test]
fn each_message_is_shown_once_with_what_matters_of_it() {
    let stream = [
        message(b'T', b"\0\0"),
        message(b'D', b"\0\x01\0\0\0\x01x"),
        message(b'C', b"SELECT 1\0"),
        message(b'Z', b"I"),
    ]
    .concat();
    let all = shown(Direction::Backend, &[&stream]).unwrap();
    let bodies: Vec<_> = all.into_iter().map(|(seen, _)| seen).collect();
    assert_eq!(
        bodies,
        [
            (b'T', 6, vec![]),
            (b'D', 11, vec![]),
            (b'C', 13, b"SELECT 1\0".to_vec()),
            (b'Z', 5, b"I".to_vec())
        ]
    );
}

#[test]
fn a_stream_that_breaks_the_rules_is_refused_at_the_head() {
    use Direction::{Backend, Frontend};
    use FrameError::{BadLength, TooLong, UnknownType};
    let head = |tag: u8, len: u32| [&[tag][..], &len.to_be_bytes()].concat();
    let large = MAX_LARGE_MESSAGE_LEN;
    let rows = [
        (Frontend, b'Q', 3, BadLength { tag: b'Q', len: 3 }),
        (Frontend, b'Q', 0, BadLength { tag: b'Q', len: 0 }),
        (Frontend, b'S', 3, BadLength { tag: b'S', len: 3 }),
        (Frontend, b'S', 10_001, TooLong { tag: b'S', len: 10_001, limit: 10_000 }),
        (Frontend, b'E', 10_001, TooLong { tag: b'E', len: 10_001, limit: 10_000 }),
        (Frontend, b'd', u32::MAX, TooLong { tag: b'd', len: u32::MAX, limit: large }),
        (Frontend, b'Z', 5, UnknownType { tag: b'Z' }),
        (Frontend, 0, 4, UnknownType { tag: 0 }),
        (Frontend, 0x16, 0x0301_0000, UnknownType { tag: 0x16 }),
        (Backend, b'Z', 4, BadLength { tag: b'Z', len: 4 }),
        (Backend, b'Z', 6, TooLong { tag: b'Z', len: 6, limit: 5 }),
        (Backend, b'K', 8, BadLength { tag: b'K', len: 8 }),
        (Backend, b'K', 265, TooLong { tag: b'K', len: 265, limit: 264 }),
        (Backend, b'C', 30_001, TooLong { tag: b'C', len: 30_001, limit: 30_000 }),
        (Backend, b'D', 0x4000_0000, TooLong { tag: b'D', len: 0x4000_0000, limit: large }),
        (Backend, b'Q', 5, UnknownType { tag: b'Q' }),
        (Backend, b'H', 4, BadLength { tag: b'H', len: 4 }),
    ];
    for (direction, tag, len, error) in rows {
        assert_eq!(tags(direction, &head(tag, len)), Err(error));
        let split = head(tag, len);
        assert_eq!(shown(direction, &[&split[..2], &split[2..]]), Err(error), "split");
    }
}

#[test]
fn a_text_longer_than_the_prefix_is_shown_cut_and_never_buffered() {
    let sql = [vec![b'x'; 1 << 20], vec![0]].concat();
    let stream = [message(b'Q', &sql), message(b'S', b"")].concat();
    let mut scanner = Scanner::new(Direction::Frontend);
    let mut seen_tags = Vec::new();
    for chunk in stream.chunks(1000) {
        scanner
            .scan(chunk, |seen| {
                if seen.tag == b'Q' {
                    assert_eq!(seen.body.len(), PREFIX_TEXT_BYTES as usize);
                    assert!(!seen.is_whole());
                }
                seen_tags.push(seen.tag);
                Flow::Pass
            })
            .unwrap();
        assert!(scanner.unshown() <= PREFIX_TEXT_BYTES as usize + HEAD_BYTES);
    }
    assert_eq!(seen_tags, b"QS");
    assert!(scanner.at_boundary());
    assert_eq!(scanner.gathered.capacity(), 0, "an idle session holds no buffer");
}

#[test]
fn who_replaces_names_sees_long_ones() {
    let name = [vec![b'n'; 3000], vec![0]].concat();
    let describe = message(b'D', &[b"S", &name[..]].concat());
    let bind = message(b'B', &[&name[..], &name, &[0; 20_000]].concat());
    for (whole, of_describe, of_bind) in [(0, 1024, 1024), (1 << 20, 3002, 16 * 1024)] {
        let mut scanner = Scanner::new(Direction::Frontend);
        scanner.show_whole(whole);
        let mut lengths = Vec::new();
        for chunk in [&describe[..], &bind].concat().chunks(700) {
            let seen = scanner.scan(chunk, |seen| {
                lengths.push(seen.body.len());
                Flow::Pass
            });
            assert_eq!(seen, Ok(chunk.len()));
        }
        assert_eq!(lengths, [of_describe, of_bind]);
    }
}

#[test]
fn an_empty_chunk_changes_nothing() {
    let mut scanner = Scanner::new(Direction::Backend);
    for piece in [&b"Z\0"[..], b"", b"\0\0\x05", b"", b"I", b""] {
        let n = scanner.scan(piece, |seen| {
            assert_eq!((seen.tag, seen.body), (b'Z', &b"I"[..]));
            Flow::Pass
        });
        assert_eq!(n, Ok(piece.len()));
    }
    assert!(scanner.at_boundary());
}

#[test]
fn a_message_can_be_left_where_it_is() {
    let stream = [message(b'S', b""), message(b'Q', b"x\0"), message(b'S', b"")].concat();
    let mut scanner = Scanner::new(Direction::Frontend);
    let stop = |seen: Seen<'_>| if seen.tag == b'Q' { Flow::StopBefore } else { Flow::Pass };
    assert_eq!(scanner.scan(&stream, stop), Ok(5));
    assert!(scanner.at_boundary());
    assert_eq!(scanner.scan(&stream[5..], |_| Flow::Pass), Ok(stream.len() - 5));
}

#[test]
fn a_split_message_that_is_left_begins_again_from_its_first_byte() {
    let stream = [message(b'S', b""), message(b'Q', b"select\0")].concat();
    for cut in 6..stream.len() {
        let mut scanner = Scanner::new(Direction::Frontend);
        let stop = |seen: Seen<'_>| if seen.tag == b'Q' { Flow::StopBefore } else { Flow::Pass };
        assert_eq!(scanner.scan(&stream[..cut], stop), Ok(cut));
        let held_back = scanner.unshown();
        assert_eq!(held_back, cut - 5);
        assert!(!scanner.at_boundary());
        assert_eq!(scanner.scan(&stream[cut..], stop), Ok(0), "cut at {cut}");
        assert!(scanner.at_boundary());
        let mut again = Vec::new();
        let whole = &stream[cut - held_back..];
        let pass = |seen: Seen<'_>| {
            again.push(seen.body.to_vec());
            Flow::Pass
        };
        assert_eq!(scanner.scan(whole, pass), Ok(whole.len()));
        assert_eq!(again, [b"select\0"]);
    }
}

#[test]
fn a_scan_can_end_behind_a_message() {
    let stream = [message(b'C', b"BEGIN\0"), message(b'Z', b"T"), message(b'N', b"\0")].concat();
    let stop = |seen: Seen<'_>| if seen.tag == b'Z' { Flow::StopAfter } else { Flow::Pass };
    let behind = stream.len() - 6;
    for cut in 0..behind {
        let mut scanner = Scanner::new(Direction::Backend);
        assert_eq!(scanner.scan(&stream[..cut], stop), Ok(cut));
        assert_eq!(scanner.scan(&stream[cut..], stop), Ok(behind - cut), "cut at {cut}");
        assert!(scanner.at_boundary());
    }
}

#[test]
fn whole_frames_are_taken_one_by_one() {
    let mut buf = BytesMut::from(&[message(b'R', b"\0\0\0\0"), message(b'Z', b"I")].concat()[..]);
    buf.extend_from_slice(b"S\0\0");
    let tags = std::iter::from_fn(|| take_frame(&mut buf, 100).unwrap()).map(|f| f.tag);
    assert_eq!(tags.collect::<Vec<_>>(), b"RZ");
    assert_eq!(&buf[..], b"S\0\0");
}

#[test]
fn a_frame_beyond_its_limit_is_refused_before_it_is_here() {
    let mut buf = BytesMut::from(&b"Q\0\0\0\x0b"[..]);
    assert_eq!(take_frame(&mut buf, 7), Ok(None));
    let refused = take_frame(&mut buf, 6);
    assert_eq!(refused, Err(FrameError::TooLong { tag: b'Q', len: 11, limit: 10 }));
    for len in 0..4u8 {
        let mut buf = BytesMut::from(&[b'Q', 0, 0, 0, len][..]);
        let bad = FrameError::BadLength { tag: b'Q', len: len.into() };
        assert_eq!(take_frame(&mut buf, 100), Err(bad));
    }
}

fn backend_message() -> impl Strategy<Value = Vec<u8>> {
    let bytes = |n| prop::collection::vec(any::<u8>(), n);
    prop_oneof![
        bytes(2..200usize).prop_map(|b| message(b'D', &b)),
        bytes(1..400usize).prop_map(|b| message(b'E', &b)),
        bytes(1..30usize).prop_map(|b| message(b'C', &b)),
        bytes(2..40usize).prop_map(|b| message(b'S', &b)),
        Just(message(b'Z', b"T")),
        Just(message(b'1', b"")),
        (16_000usize..17_000).prop_map(|n| message(b'N', &vec![7; n])),
    ]
}

fn cut<'a>(stream: &'a [u8], cuts: &[prop::sample::Index]) -> Vec<&'a [u8]> {
    let mut at: Vec<usize> = cuts.iter().map(|i| i.index(stream.len() + 1)).collect();
    at.sort_unstable();
    let mut from = 0;
    let mut chunks = Vec::new();
    for to in at.into_iter().chain([stream.len()]) {
        chunks.push(&stream[from..to]);
        from = to;
    }
    chunks
}

proptest! {
    #[test]
    fn any_split_shows_the_same(
        messages in prop::collection::vec(backend_message(), 1..12),
        cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..12),
    ) {
        let stream = messages.concat();
        let whole = shown(Direction::Backend, &[&stream]).unwrap();
        prop_assert_eq!(whole.len(), messages.len());
        let pieces = shown(Direction::Backend, &cut(&stream, &cuts)).unwrap();
        prop_assert_eq!(&whole, &pieces);
        let tiny: Vec<&[u8]> = stream.chunks(3).collect();
        prop_assert_eq!(&whole, &shown(Direction::Backend, &tiny).unwrap());
    }

    #[test]
    fn any_split_of_any_bytes_ends_the_same(
        stream in prop::collection::vec(any::<u8>(), 0..300),
        cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..6),
    ) {
        for direction in [Direction::Frontend, Direction::Backend] {
            let whole = shown(direction, &[&stream]);
            prop_assert_eq!(whole, shown(direction, &cut(&stream, &cuts)));
        }
    }

    #[test]
    fn no_bytes_break_the_scanner(input in prop::collection::vec(any::<u8>(), 0..400)) {
        fuzz_scan(&input);
        fuzz_take_frame(&input);
    }

    #[test]
    fn no_damage_breaks_the_scanner(
        messages in prop::collection::vec(backend_message(), 1..6),
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
        step in any::<u8>(),
    ) {
        let mut input = vec![step];
        input.extend(messages.concat());
        for (at, byte) in damage {
            let at = at.index(input.len());
            input[at] = byte;
        }
        fuzz_scan(&input);
        fuzz_take_frame(&input[1..]);
    }
}

#[test]
fn a_long_text_is_shown_whole_if_that_is_wanted() {
    let text = vec![b'x'; 40_000];
    let mut message = BytesMut::new();
    crate::frontend::put_query(&text, &mut message).unwrap();
    let shown = |limit: u32, piece: usize| {
        let mut scanner = Scanner::new(Direction::Frontend);
        scanner.show_whole(limit);
        let mut shown = None;
        for chunk in message.chunks(piece) {
            scanner
                .scan(chunk, |seen| {
                    shown = Some((seen.body.len(), seen.is_whole()));
                    Flow::Pass
                })
                .unwrap();
        }
        assert!(scanner.at_boundary());
        shown
    };
    for piece in [1000, 16_384, 100_000] {
        assert_eq!(shown(0, piece), Some((16 * 1024, false)));
        assert_eq!(shown(1 << 20, piece), Some((40_001, true)));
        assert_eq!(shown(40_000, piece), Some((16 * 1024, false)), "longer than wanted");
    }
}
