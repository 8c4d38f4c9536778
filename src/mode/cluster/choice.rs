//! What can be chosen of a pool.

/// What an instance lives for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum InstanceLife {
    /// The worker: what it keeps in memory is there for the next task.
    #[default]
    Worker,
    /// One task.
    Task,
}

/// How a task that is out of time is ended.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Interrupt {
    /// With its worker. The guest is compiled without checks, so its loops run at full speed.
    Kill,
    /// By checks that are compiled into it: the worker lives on, tight loops are slower.
    Epoch,
    /// [`Interrupt::Epoch`] when a worker handles several tasks at once, else [`Interrupt::Kill`].
    #[default]
    Auto,
}

/// How connections get to the workers of a port.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Balance {
    /// All accept from one socket, and who holds more than its share lets others go first. The connections that wait
    /// belong to nobody, so none of them feels it when a worker dies.
    #[default]
    Shared,
    /// Each slot has a socket of its own, and the kernel spreads connections over them by their addresses. Those that
    /// wait at the socket of a dead worker wait for its successor.
    Slots,
}
