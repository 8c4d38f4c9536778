//! The router, from here: how it is kept, and what it says.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use super::Builder;
use crate::{
    child::{RouterConfig, jail_of_router},
    event::AccessRecord,
    process::{
        Process, Program, Role,
        wire::{Frame, Kind},
    },
    supervisor::{EventSink, Launch, Policy, Supervisor, Watch},
};

/// How long the router may take to get ready.
const READY_WITHIN: Duration = Duration::from_secs(10);

/// The longest frame that the router sends.
const FRAME_MAX: u32 = 64 << 10;

/// What keeps the router, which serves the listener as long as there is one.
pub(super) fn router(builder: &Builder, listener: Arc<Mutex<Option<OwnedFd>>>, events: EventSink) -> Supervisor {
    let config = RouterConfig {
        http: builder.http.clone(),
        access_log: builder.access_log,
        trusted: builder.trusted.clone(),
        queue: builder.queue,
        beat: builder.heartbeat / 10,
        jail: jail_of_router(builder.isolation, &builder.http),
    };
    let launch: Launch = Box::new(move |_, _| {
        let listener = listener.lock().unwrap_or_else(PoisonError::into_inner);
        let listener = listener.as_ref().ok_or(io::ErrorKind::NotConnected)?;
        Process::start(&Program::Own, Role::Router, &config, &[listener.as_fd()], FRAME_MAX)
    });
    let watch = Watch {
        policy: Policy::default(),
        heartbeat: builder.heartbeat,
        ready_within: READY_WITHIN,
        grace: builder.grace,
        memory_max: None,
    };
    Supervisor::new(1, watch, launch, events)
}

/// What the router says.
pub(super) enum Told {
    /// A request, after so many that are not told of.
    Access(Box<AccessRecord>, u64),
    /// Nothing of a run is in flight any more.
    Idle(u64),
    /// Somebody waits for an app.
    Wake(String),
    /// So many changes hold.
    Routed(u64),
}

/// Reads what it says.
///
/// # Errors
/// What it should not have said.
pub(super) fn told_by(frame: Frame<'_>) -> Result<Told, String> {
    match frame.kind {
        Kind::Access => serde_json::from_slice(frame.body)
            .map(|record| Told::Access(record, frame.id))
            .map_err(|error| format!("it sent a broken access record: {error}")),
        Kind::Idle => Ok(Told::Idle(frame.id)),
        Kind::Routed => Ok(Told::Routed(frame.id)),
        Kind::Wake => Ok(Told::Wake(String::from_utf8_lossy(frame.body).into_owned())),
        kind => Err(format!("it sent {kind:?}, which is not for a folder")),
    }
}
