//! What `fuzz/` and the tests push at the code that reads what strangers send: bytes in, and a panic when a promise is
//! broken. Not a part of the ordinary build: `cargo fuzz` sets `cfg(fuzzing)`.

use std::{iter, sync::LazyLock, time::Duration};

use crate::{
    child::framing::{Doing, Framing},
    limits::{Bytes, CompileLimits, Limits},
    outcome::{End, Outcome, Stage, Usage},
    process::wire::{Incoming, Kind, Outgoing, WireError},
    sandbox::{EngineSpec, Inspection, LoadError, binary, check, compile},
};

/// The cuts between reads that each input is tried with, as lengths that are repeated: whole, and in pieces that end
/// within a header, at its end, and within a body.
const CUTS: [&[usize]; 5] = [&[usize::MAX], &[1], &[2, 3], &[13], &[1, 40, 5]];

/// What was read of one stream of frames, and why no more.
type Read = (Vec<(Kind, u64, Vec<u8>)>, Option<WireError>);

/// Takes bytes for the frames of a peer.
///
/// # Panics
/// When what is read of them depends on the cuts between reads, is not what was sent, or takes more memory than frames
/// may.
pub fn frames(bytes: &[u8]) {
    for body_max in [64, 2000] {
        let whole = read_frames(bytes, body_max, CUTS[0]);
        for cuts in &CUTS[1..] {
            assert_eq!(read_frames(bytes, body_max, cuts), whole, "bodies of {body_max}, cuts {cuts:?}");
        }
        sent(bytes, body_max, &whole);
    }
}

/// Reads frames as a primary does, with these many bytes at once.
fn read_frames(mut bytes: &[u8], body_max: u32, cuts: &[usize]) -> Read {
    let mut incoming = Incoming::new(body_max);
    let mut frames = vec![];
    for &cut in cuts.iter().cycle() {
        let space = incoming.space();
        // all of a longest frame but its last byte, and a read; twice, as a vector may grow
        assert!(space.capacity() <= 2 * (body_max as usize + (65 << 10)), "{} bytes", space.capacity());
        let room = space.capacity() - space.len();
        assert!(room > 0, "a read without room looks like the end");
        let (piece, rest) = bytes.split_at(cut.min(room).min(bytes.len()));
        if piece.is_empty() {
            break;
        }
        space.extend_from_slice(piece);
        bytes = rest;
        loop {
            match incoming.next() {
                Ok(Some(frame)) => frames.push((frame.kind, frame.id, frame.body.to_vec())),
                Ok(None) => break,
                Err(error) => return (frames, Some(error)),
            }
        }
    }
    (frames, None)
}

/// Sees that the frames are the bytes that were sent, up to where they are refused or not yet whole.
fn sent(bytes: &[u8], body_max: u32, (frames, error): &Read) {
    let mut outgoing = Outgoing::default();
    for (kind, id, body) in frames {
        assert!(body.len() <= body_max as usize);
        outgoing.push(*kind, *id, body);
    }
    let rest = bytes.strip_prefix(outgoing.pending()).expect("frames are what was sent");
    let length = rest.first_chunk().map(|length| u32::from_le_bytes(*length));
    let kind = rest.get(4);
    match error {
        Some(WireError::TooLong { length: found, max }) => {
            assert_eq!((Some(*found), *max), (length, body_max));
            assert!(*found > body_max);
        }
        Some(WireError::UnknownKind { kind: found }) => {
            assert_eq!(Some(found), kind);
            assert!(!(1..=20).contains(found));
        }
        None => {
            assert!(length.is_none_or(|length| length <= body_max && rest.len() < 13 + length as usize));
            assert!(kind.is_none_or(|kind| (1..=20).contains(kind)));
        }
    }
}

/// What bounds the guests here: one that is taken is compiled in a moment.
const LIMITS: CompileLimits = CompileLimits {
    time: Duration::from_secs(10),
    memory: Bytes::mib(1024),
    functions: 100,
    locals: 500,
    body: Bytes::kib(4),
    nesting: 100,
};

/// What compiles and links bytes, as the process that compiles guests does.
type Compile = dyn Fn(&[u8]) -> Result<(), LoadError> + Send + Sync;

/// Made once: an engine takes longer than a small guest.
static COMPILE: LazyLock<Box<Compile>> = LazyLock::new(|| {
    let stack = Limits::of_a_run().stack;
    let spec = EngineSpec { epoch_checks: false, fuel: false, stack, pool: None };
    let engines = spec.engines().expect("there is such an engine");
    Box::new(move |bytes| check(&compile(&engines, bytes.to_vec(), &LIMITS)?))
});

/// Takes bytes for a guest: says what it is, compiles it and links it, in this process.
///
/// # Panics
/// When the guest is refused without a proper reason, or what is told of it depends on who asks.
pub fn guest(bytes: &[u8]) {
    let told = binary(bytes.to_vec()).and_then(|wasm| Inspection::of(&wasm));
    let compiled = COMPILE(bytes);
    for error in told.as_ref().err().into_iter().chain(compiled.as_ref().err()) {
        refused(error);
    }
    match (told, compiled) {
        (Err(told), Err(compiled)) => assert_eq!(told.to_string(), compiled.to_string()),
        (Err(told), Ok(())) => panic!("compiled, but not inspected: {told}"),
        (Ok(inspection), _) => assert_eq!(round_trip(&inspection), inspection),
    }
}

/// Sees that an error is one that a guest may cause, and that a primary can be told of it.
fn refused(error: &LoadError) {
    // what was compiled a moment ago fits
    assert!(!matches!(error, LoadError::Precompiled { .. }), "{error}");
    let end = error.end();
    let End::Failed { stage: Stage::Compile | Stage::Link, reason, hint } = &end else { panic!("{end:?}") };
    for text in iter::once(reason).chain(hint) {
        assert!(!text.is_empty() && text.lines().count() == 1, "{text:?}");
    }
    let outcome: Outcome = end.with(Usage::default());
    assert_eq!(round_trip(&outcome), outcome);
}

fn round_trip<T: serde::Serialize + serde::de::DeserializeOwned>(value: &T) -> T {
    let text = serde_json::to_vec(value).expect("plain data has a JSON form");
    serde_json::from_slice(&text).expect("and is read back")
}

/// Takes bytes for the requests of an HTTP client.
///
/// # Panics
/// When the verdict on them depends on the cuts between reads, or a request that ended has a part in the next one.
pub fn requests(bytes: &[u8]) {
    // a head that is too long is the server's to refuse: whether that shows here depends on the cuts
    let verdict = |cuts| look(bytes, bytes.len(), cuts);
    let whole = verdict(CUTS[0]);
    for cuts in &CUTS[1..] {
        assert_eq!(verdict(cuts), whole, "cuts {cuts:?}");
        let _ = look(bytes, 16, cuts);
    }
    // a lone CR begins an empty line or a bad one
    if whole == Ok(Doing::Nothing) && !bytes.ends_with(b"\r") {
        let next = [bytes, b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"].concat();
        assert_eq!(look(&next, next.len(), CUTS[0]), Ok(Doing::Nothing));
    }
}

/// What becomes of bytes that come in pieces: what the client is doing, or why they are refused, and whether in a body.
fn look(mut bytes: &[u8], head_max: usize, cuts: &[usize]) -> Result<Doing, (&'static str, bool)> {
    let mut framing = Framing::new(head_max);
    for &cut in cuts.iter().cycle() {
        let (piece, rest) = bytes.split_at(cut.min(bytes.len()));
        if piece.is_empty() {
            break;
        }
        bytes = rest;
        if let Err(refused) = framing.look(piece) {
            assert!(refused.good <= piece.len() && !refused.poison.is_empty());
            // nothing that comes after is looked at
            assert_eq!(framing.look(bytes), Ok(()));
            return Err((refused.reason, refused.is_body));
        }
    }
    Ok(framing.doing())
}

#[cfg(test)]
mod tests {
    use std::{fs, panic::catch_unwind, path::Path};

    use proptest::{
        collection::vec,
        prelude::*,
        test_runner::{RngAlgorithm, TestRng, TestRunner},
    };

    use super::*;

    /// How long the names are that a run of the fuzzer gives to what it adds.
    const HASH: usize = 40;

    /// Pushes a target's corpus at it, as git has it.
    fn corpus(name: &str, target: fn(&[u8])) {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(name);
        let mut count = 0;
        for entry in fs::read_dir(&folder).expect("a corpus") {
            let path = entry.expect("an entry").path();
            if path.file_name().is_some_and(|name| name.len() == HASH) {
                continue;
            }
            let bytes = fs::read(&path).expect("a file");
            assert!(catch_unwind(|| target(&bytes)).is_ok(), "it was {}", path.display());
            count += 1;
        }
        assert!(count > 0);
    }

    #[test]
    fn the_corpus_of_frames_passes() {
        corpus("frames", frames);
    }

    #[test]
    fn the_corpus_of_guests_passes() {
        // what stands there as text is a binary, too
        corpus("guests", |bytes| {
            guest(bytes);
            if let Ok(wasm) = binary(bytes.to_vec()) {
                guest(&wasm);
            }
        });
    }

    #[test]
    fn the_corpus_of_requests_passes() {
        corpus("requests", requests);
    }

    /// The same cases each time; one that fails is printed, at its smallest.
    fn holds<S: Strategy>(strategy: &S, test: impl Fn(S::Value)) {
        let config = ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() };
        let rng = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
        let result = TestRunner::new_with_rng(config, rng).run(strategy, |value| {
            test(value);
            Ok(())
        });
        result.unwrap_or_else(|error| panic!("{error}"));
    }

    fn frame() -> impl Strategy<Value = (Kind, u64, Vec<u8>)> {
        let kind = (1..=20u8).prop_map(|kind| Kind::from_byte(kind).expect("a kind"));
        (kind, any::<u64>(), vec(any::<u8>(), 0..200))
    }

    fn bytes_of(frames: &[(Kind, u64, Vec<u8>)]) -> Vec<u8> {
        let mut outgoing = Outgoing::default();
        for (kind, id, body) in frames {
            outgoing.push(*kind, *id, body);
        }
        outgoing.pending().to_vec()
    }

    #[test]
    fn frames_arrive_whatever_the_cuts() {
        let cuts = vec(prop_oneof![1..20usize, 1..2000usize], 1..20);
        holds(&(vec(frame(), 0..20), cuts), |(frames, cuts)| {
            assert_eq!(read_frames(&bytes_of(&frames), 200, &cuts), (frames, None));
        });
    }

    #[test]
    fn damaged_frames_are_read_as_far_as_they_are_whole() {
        let damage = vec((any::<prop::sample::Index>(), any::<u8>()), 1..4);
        holds(&(vec(frame(), 1..8), damage, any::<prop::sample::Index>()), |(whole, damage, end)| {
            let mut bytes = bytes_of(&whole);
            for (at, byte) in damage {
                let at = at.index(bytes.len());
                bytes[at] = byte;
            }
            bytes.truncate(end.index(bytes.len()) + 1);
            frames(&bytes);
        });
    }

    /// Pieces that requests are made of, right and wrong, and the rest.
    fn of_a_request() -> impl Strategy<Value = Vec<u8>> {
        const WORDS: [&str; 26] = [
            "GET / HTTP/1.1\r\n",
            "POST /a HTTP/1.1\r\nHost: a\r\n",
            "GET / HTTP/1.0\r\n",
            "Host: a\r\n",
            "Content-Length: 3\r\n",
            "Content-Length: 0\r\n",
            "content-length:18446744073709551615\r\n",
            "Transfer-Encoding: chunked\r\n",
            "transfer-encoding: gzip\r\n",
            "\r\n",
            "\n",
            "\r",
            "\r\n\r\n",
            "abc",
            "3\r\nabc\r\n",
            "0\r\n\r\n",
            "0\r\na: b\r\n\r\n",
            "3;a=b\r\nabc\r\n",
            "ffffffffffffffff\r\n",
            "A",
            " ",
            ":",
            "\0",
            "x: y\r\n",
            "GET / HTTP/1.1\r\nHost: a\r\n\r\n",
            "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n",
        ];
        prop_oneof![
            20 => prop::sample::select(&WORDS[..]).prop_map(|word| word.as_bytes().to_vec()),
            1 => vec(any::<u8>(), 1..8),
        ]
    }

    #[test]
    fn requests_are_read_alike_whatever_the_cuts() {
        holds(&vec(of_a_request(), 0..24), |pieces| requests(&pieces.concat()));
    }
}
