//! A child that compiles one guest, or says what it is: whatever the guest's bytes do to a compiler, they do it to a
//! process that has nothing else to lose. Both ends are here.

use std::{
    fs::File,
    future::poll_fn,
    io::{Read, Seek, SeekFrom, Write},
    os::fd::AsFd,
    path::PathBuf,
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
    sandbox::{Cache, Code, EngineSpec, Guest, Inspection, LoadError, binary, check, compile},
};

/// What a compiler is told.
#[derive(Debug, Serialize, Deserialize)]
struct CompilerConfig {
    /// For which engine; none = it says what the guest is, and no more.
    engine: Option<EngineSpec>,
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
            let Some(engine) = config.engine else {
                return Inspection::of(&binary(bytes)?).map(Some);
            };
            let engine = engine.engine().map_err(|error| LoadError::Invalid { reason: error.to_string() })?;
            let packed = compile(&engine, bytes)?;
            code.write_all(&packed).map_err(unreadable)?;
            check(&engine, &Code::open(code).ok_or(LoadError::Precompiled { reason: "it is damaged".into() })?)?;
            Ok(None)
        });
    match result {
        Ok(inspection) => {
            out.push(Kind::Ready, 0, &serde_json::to_vec(&inspection).expect("plain data has a JSON form"));
        }
        Err(error) => {
            let outcome = error.end().with(Usage::default());
            out.push(Kind::Ended, 0, &serde_json::to_vec(&outcome).expect("plain data has a JSON form"));
        }
    }
    out.finish();
    0
}

/// Finds a guest's code, if it was compiled before.
///
/// # Errors
/// When there is no such engine.
pub(crate) fn find_compiled(cache: &Cache, spec: EngineSpec, guest: &Guest) -> Result<Option<Code>, Error> {
    Ok(entry(cache, spec, guest)?.as_deref().and_then(Cache::find))
}

/// Where a guest's code is kept; none when it is not.
fn entry(cache: &Cache, spec: EngineSpec, guest: &Guest) -> Result<Option<PathBuf>, Error> {
    // code does not depend on the room that its instances will have
    let engine = EngineSpec { pool: None, ..spec }.engine().map_err(|error| Error::Usage(format!("{error:#}")))?;
    Ok(cache.entry(&engine, guest))
}

/// Has a child say what a guest is.
///
/// # Errors
/// When it is no guest, or there is no room for the child.
pub(crate) async fn inspect_aside(program: &Program, guest: &Guest) -> Result<Inspection, Error> {
    let (said, _) = run(program, CompilerConfig { engine: None }, guest).await?;
    let said = serde_json::from_slice::<Option<Inspection>>(&said).ok().flatten();
    said.ok_or_else(|| LoadError::Invalid { reason: "its compiler does not say what it is".into() }.into())
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
    if let Some(code) = find_compiled(cache, spec, &guest)? {
        tracing::debug!("`{}` was compiled before", guest.name);
        return Ok(code);
    }
    let started = Instant::now();
    let config = CompilerConfig { engine: Some(EngineSpec { pool: None, ..spec }) };
    let (_, mut output) = run(program, config, &guest).await?;
    tracing::debug!("`{}` was compiled in {:?}", guest.name, started.elapsed());
    let mut packed = Vec::new();
    output
        .seek(SeekFrom::Start(0))
        .and_then(|_| output.read_to_end(&mut packed))
        .map_err(Error::io("read the compiled guest"))?;
    Cache::keep(entry(cache, spec, &guest)?.as_deref(), &packed).map_err(Error::io("keep the compiled guest"))
}

/// Runs a child on a guest: what it said when it was done, and the file that it wrote.
async fn run(program: &Program, config: CompilerConfig, guest: &Guest) -> Result<(Vec<u8>, File), Error> {
    let file = |name: &str| rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC).map(File::from);
    let (mut input, output) = file("wrun-guest")
        .and_then(|input| Ok((input, file("wrun-code")?)))
        .map_err(|error| Error::Io { what: "make a file in memory", source: error.into() })?;
    input.write_all(&guest.bytes).map_err(Error::io("copy the guest"))?;

    let fds = [input.as_fd(), output.as_fd()];
    let body_max = u32::try_from(Bytes::mib(1).0).expect("small");
    let mut child =
        Process::start(program, Role::Compiler, &config, &fds, body_max).map_err(Error::io("start a compiler"))?;
    child.flush();
    tracing::debug!("{} `{}`", if config.engine.is_some() { "compiling" } else { "inspecting" }, guest.name);
    let (mut ready, mut said) = (None, None);
    let end = poll_fn(|cx| {
        loop {
            let seen = child.poll(cx, |frame| match frame.kind {
                Kind::Ready => ready = Some(frame.body.to_vec()),
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
    match (said.map(|outcome| outcome.end), ready) {
        (Some(End::Failed { stage, reason, hint }), _) => Err(LoadError::Reported { stage, reason, hint }.into()),
        (_, Some(said)) => Ok((said, output)),
        _ => Err(LoadError::Invalid { reason: format!("its compiler {end}") }.into()),
    }
}
