//! A child that compiles one guest: whatever the guest's bytes do to a compiler, they do it to a process that has
//! nothing else to lose. Both ends are here.

use std::{
    fs::File,
    future::poll_fn,
    io::{Read, Seek, SeekFrom, Write},
    os::fd::AsFd,
    task::Poll,
    time::Instant,
};

use rustix::fs::MemfdFlags;
use serde::{Deserialize, Serialize};

use crate::{
    Error,
    limits::Bytes,
    outcome::{End, Outcome, Usage},
    process::{
        Process, Program, Role, Seen,
        child::{Out, Start},
        wire::Kind,
    },
    sandbox::{Cache, Code, EngineSpec, Guest, LoadError, check, compile},
};

/// What a compiler is told.
#[derive(Debug, Serialize, Deserialize)]
struct CompilerConfig {
    engine: EngineSpec,
}

/// The child: reads the guest from the first descriptor and writes its code to the second.
pub(super) fn main(start: Start) -> i32 {
    let out = Out::new(start.socket);
    let result = serde_json::from_str::<CompilerConfig>(start.hello.config.get())
        .map_err(|error| LoadError::Invalid { reason: error.to_string() })
        .and_then(|config| {
            let mut fds = start.fds.into_iter().skip(1).map(File::from);
            let (Some(mut guest), Some(mut code)) = (fds.next(), fds.next()) else {
                return Err(LoadError::Invalid { reason: "the compiler got no files".into() });
            };
            let unreadable = |source| LoadError::Unreadable { path: "the guest's copy".into(), source };
            let mut bytes = Vec::new();
            guest.seek(SeekFrom::Start(0)).and_then(|_| guest.read_to_end(&mut bytes)).map_err(unreadable)?;
            let engine = config.engine.engine().map_err(|error| LoadError::Invalid { reason: error.to_string() })?;
            let packed = compile(&engine, bytes)?;
            code.write_all(&packed).map_err(unreadable)?;
            check(&engine, &Code::open(code).ok_or(LoadError::Precompiled { reason: "it is damaged".into() })?)
        });
    if let Err(error) = result {
        let outcome = error.end().with(Usage::default());
        out.push(Kind::Ended, 0, &serde_json::to_vec(&outcome).expect("plain data has a JSON form"));
    } else {
        out.push(Kind::Ready, 0, b"");
    }
    out.finish();
    0
}

/// Finds a guest's code, or has it compiled by a child.
///
/// # Errors
/// When the guest is not valid or cannot be linked, or there is no room for the child or the code.
pub(crate) async fn compile_aside(
    program: &Program,
    cache: &Cache,
    spec: EngineSpec,
    guest: Guest,
) -> Result<Code, Error> {
    // code does not depend on the room that its instances will have
    let spec = EngineSpec { pool: None, ..spec };
    let engine = spec.engine().map_err(|error| Error::Usage(format!("{error:#}")))?;
    let entry = cache.entry(&engine, &guest);
    if let Some(code) = entry.as_deref().and_then(Cache::find) {
        tracing::debug!("`{}` was compiled before", guest.name);
        return Ok(code);
    }
    let started = Instant::now();
    let file = |name: &str| rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC).map(File::from);
    let (mut input, mut output) = file("wrun-guest")
        .and_then(|input| Ok((input, file("wrun-code")?)))
        .map_err(|error| Error::Io { what: "make a file in memory", source: error.into() })?;
    input.write_all(&guest.bytes).map_err(Error::io("copy the guest"))?;

    let config = CompilerConfig { engine: spec };
    let fds = [input.as_fd(), output.as_fd()];
    let body_max = u32::try_from(Bytes::mib(1).0).expect("small");
    let mut child =
        Process::start(program, Role::Compiler, &config, &fds, body_max).map_err(Error::io("start a compiler"))?;
    tracing::debug!("compiling `{}`", guest.name);
    child.flush();
    let (mut ready, mut said) = (false, None);
    let end = poll_fn(|cx| {
        loop {
            let seen = child.poll(cx, |frame| match frame.kind {
                Kind::Ready => ready = true,
                Kind::Ended => said = serde_json::from_slice::<Outcome>(frame.body).ok(),
                _ => {}
            });
            match seen {
                Poll::Ready(Seen::Gone(end)) => return Poll::Ready(end),
                Poll::Ready(_) => {}
                Poll::Pending => return Poll::Pending,
            }
        }
    })
    .await;
    match said.map(|outcome| outcome.end) {
        Some(End::Failed { stage, reason, hint }) => return Err(LoadError::Reported { stage, reason, hint }.into()),
        _ if !ready => return Err(LoadError::Invalid { reason: format!("its compiler {end}") }.into()),
        _ => {}
    }
    tracing::debug!("`{}` was compiled in {:?}", guest.name, started.elapsed());
    let mut packed = Vec::new();
    output
        .seek(SeekFrom::Start(0))
        .and_then(|_| output.read_to_end(&mut packed))
        .map_err(Error::io("read the compiled guest"))?;
    Cache::keep(entry.as_deref(), &packed).map_err(Error::io("keep the compiled guest"))
}
