//! The wall clock of the frame scan, the only thing the data path does with most bytes.
//!
//! The pair to compare is `copy` and `copy and scan`: what the scan adds to moving the same bytes,
//! as reading them from a socket does. Chunks are 64 KiB, the size of the proxy's buffers, and cut
//! messages wherever they end.

use std::hint::black_box;

use bytes::{BufMut, BytesMut};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use kornak_protocol::frame::{Direction, Flow, Scanner, take_frame};

const CHUNK: usize = 64 << 10;
const STREAM: usize = 4 << 20;

/// Results of `SELECT`: DataRows of one column of this many bytes, a CommandComplete and a
/// ReadyForQuery after each hundred.
fn rows(column: usize) -> Vec<u8> {
    let mut out = BytesMut::with_capacity(STREAM + 2 * column);
    let length = |bytes: usize| i32::try_from(bytes).expect("short");
    while out.len() < STREAM {
        for _ in 0..100 {
            out.put_u8(b'D');
            out.put_i32(length(4 + 2 + 4 + column));
            out.put_i16(1);
            out.put_i32(length(column));
            out.put_bytes(b'x', column);
        }
        out.put_slice(b"C\0\0\0\x0fSELECT 100\0");
        out.put_slice(b"Z\0\0\0\x05I");
    }
    out.to_vec()
}

fn scan_all(scanner: &mut Scanner, chunk: &[u8]) -> usize {
    let mut shown = 0;
    let scanned = scanner.scan(chunk, |seen| {
        shown += usize::from(seen.tag != b'D');
        Flow::Pass
    });
    scanned.expect("the stream is well formed");
    shown
}

fn frame(criterion: &mut Criterion) {
    for column in [64, 8192] {
        let stream = rows(column);
        let mut group = criterion.benchmark_group(format!("rows of {column} B"));
        group.throughput(Throughput::Bytes(stream.len() as u64));
        let mut buffer = vec![0; CHUNK];
        group.bench_function("copy", |bench| {
            bench.iter(|| {
                for chunk in stream.chunks(CHUNK) {
                    buffer[..chunk.len()].copy_from_slice(black_box(chunk));
                    black_box(&buffer);
                }
            });
        });
        group.bench_function("copy and scan", |bench| {
            bench.iter(|| {
                let mut scanner = Scanner::new(Direction::Backend);
                let mut shown = 0;
                for chunk in stream.chunks(CHUNK) {
                    let buffer = &mut buffer[..chunk.len()];
                    buffer.copy_from_slice(black_box(chunk));
                    shown += scan_all(&mut scanner, buffer);
                }
                black_box(shown)
            });
        });
        group.bench_function("take whole frames", |bench| {
            bench.iter(|| {
                let mut buffer = BytesMut::with_capacity(2 * CHUNK);
                let mut taken = 0;
                for chunk in stream.chunks(CHUNK) {
                    buffer.extend_from_slice(black_box(chunk));
                    while let Ok(Some(frame)) = take_frame(&mut buffer, CHUNK) {
                        taken += frame.body.len();
                    }
                }
                black_box(taken)
            });
        });
        group.finish();
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(20).without_plots();
    targets = frame
}
criterion_main!(benches);
