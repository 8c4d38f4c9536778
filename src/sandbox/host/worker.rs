//! `wrun:guest/worker`: who am I.

use std::sync::LazyLock;

use serde::{Deserialize, Serialize};

use crate::sandbox::{
    host::bindings::wrun::guest::worker::{Host, Identity as WitIdentity, Kind},
    instance::State,
};

/// The worker that an instance runs as.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Identity {
    /// Its slot, from 1.
    pub(crate) id: u32,
    /// How many workers the pool has.
    pub(crate) count: u32,
    /// Which start of the slot it is, from 1.
    pub(crate) generation: u32,
    /// The guest's name.
    pub(crate) name: String,
    /// Whether it has a process of its own.
    pub(crate) process: bool,
}

impl Identity {
    /// The only worker of its parent.
    pub(crate) fn alone(name: String, process: bool) -> Self {
        Self { id: 1, count: 1, generation: 1, name, process }
    }
}

/// It does not change, and to ask for it is a system call.
static PID: LazyLock<u32> = LazyLock::new(std::process::id);

impl Host for State {
    fn get_identity(&mut self) -> WitIdentity {
        let identity = &self.setup.identity;
        WitIdentity {
            id: identity.id,
            kind: if identity.process { Kind::Process } else { Kind::Thread },
            count: identity.count,
            generation: identity.generation,
            pid: *PID,
            name: identity.name.clone(),
        }
    }

    fn get_data(&mut self) -> String {
        self.setup.data.as_str().into()
    }
}
