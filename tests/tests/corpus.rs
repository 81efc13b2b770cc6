//! Plays what the fuzzers found worth keeping (`tests/fuzz`) with every test run.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};

/// Length of a header and of what contents are filled up to in a tar archive.
const BLOCK: usize = 512;

/// Plays every file of one target's archive; answers how many there are.
fn play(target: &str, entry: impl Fn(&[u8])) -> Result<usize> {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus");
    let file = corpus.join(format!("{target}.tar"));
    let archive = fs::read(&file).with_context(|| format!("read {}", file.display()))?;
    let (mut at, mut inputs) = (0, 0);
    // Two empty blocks end it.
    while let Some(header) = archive.get(at..at + BLOCK).filter(|block| block[0] != 0) {
        let size = std::str::from_utf8(&header[124..135])?;
        let size = usize::from_str_radix(size, 8).context("the size of a file")?;
        at += BLOCK;
        if header[156] == b'0' {
            entry(archive.get(at..at + size).context("the archive is cut")?);
            inputs += 1;
        }
        at += size.next_multiple_of(BLOCK);
    }
    ensure!(inputs > 500, "{} has only {inputs} inputs", file.display());
    Ok(inputs)
}

#[test]
fn every_input_of_the_corpus_is_taken() -> Result<()> {
    for (target, entry) in kornak_proxy::session::fuzz::ENTRIES {
        println!("{target}: {} inputs", play(target, entry)?);
    }
    let entries = kornak_protocol::fuzz::ENTRIES;
    let inputs = play("protocol", |data| {
        let Some((which, data)) = data.split_first() else { return };
        entries[usize::from(*which) % entries.len()].1(data);
    })?;
    println!("protocol: {inputs} inputs");
    Ok(())
}
