//! The engine: few configurations, chosen by what the guest is and how it is to be interrupted.
//!
//! What is set here decides which compiled code fits ([`EngineSpec::fingerprint`] is part of the cache's names).

use sha2::{Digest, Sha256};
use wasmtime::{Config, Enabled, Engine, InstanceAllocationStrategy, PoolingAllocationConfig, WasmBacktraceDetails};

use crate::{
    limits::Bytes,
    sandbox::{Inspection, code::MAGIC},
};

/// The engine and its version, by which fuel is counted.
pub(crate) const ENGINE: &str = "wasmtime 48.0.8";

/// What an engine is made of.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize, serde::Deserialize)]
pub(crate) struct EngineSpec {
    /// Compile checks into loops and calls, so that a running guest can be interrupted from inside its process. They
    /// make tight loops 2 to 5 times slower; a guest in a process of its own can be killed instead.
    pub(crate) epoch_checks: bool,
    /// Compile metering into the code.
    pub(crate) fuel: bool,
    /// The stack of one instance.
    pub(crate) stack: Bytes,
    /// Room for this many instances at once, made beforehand and reused; none = made and given back each time.
    pub(crate) pool: Option<Pool>,
}

/// The room of a pooling engine.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize, serde::Deserialize)]
pub(crate) struct Pool {
    /// How many instances may live at once.
    pub(crate) instances: u32,
    /// The most linear memory of one.
    pub(crate) memory: Bytes,
}

/// The engines of a compiler, made when there is need for them. The first one prepares the process, by signal handlers, and
/// must be there before that is forbidden; more of them are plain data.
pub(crate) struct Engines {
    pub(super) spec: EngineSpec,
    pub(crate) ordinary: Engine,
}

impl Engines {
    pub(super) fn of(&self, guest: &Inspection) -> wasmtime::Result<Engine> {
        if guest.has_threads() { self.spec.engine(guest) } else { Ok(self.ordinary.clone()) }
    }
}

/// Core instances that one guest may have: a plain component of `wasm32-wasip2` has 3, linked languages about 20.
pub(super) const CORE_INSTANCES_MAX: u32 = 32;
/// Linear memories that one guest may have.
pub(super) const MEMORIES_MAX: u32 = 4;
/// Tables that one guest may have.
pub(super) const TABLES_MAX: u32 = 8;
/// Elements that one table may have; a function pointer takes one.
pub(super) const TABLE_ELEMENTS_MAX: usize = 100_000;

/// What host calls may need on top of a guest's stack: as much as the engine's defaults leave.
pub(super) const HOST_STACK: usize = 3 << 19;

impl EngineSpec {
    /// Makes the engine for a guest.
    ///
    /// WASI 0.3 is off, and threads are for those that share their memory: others do not need them, and they are the younger
    /// part of the engine.
    pub(crate) fn engine(&self, guest: &Inspection) -> wasmtime::Result<Engine> {
        self.engine_with(guest.has_threads())
    }

    /// Makes the engine for whatever guest is compiled. What compiled code is kept under is the fingerprint of the ordinary
    /// one, for all guests: which of them has threads is decided by its content.
    pub(crate) fn engines(self) -> wasmtime::Result<Engines> {
        Ok(Engines { ordinary: self.engine_with(false)?, spec: self })
    }

    fn engine_with(&self, threads: bool) -> wasmtime::Result<Engine> {
        let mut config = Config::new();
        config
            .wasm_component_model(true)
            // what C++ throws; of the engine's garbage collector, which keeps that, guests have nothing else
            .wasm_exceptions(true)
            .wasm_gc(false)
            .wasm_threads(threads)
            .shared_memory(threads)
            .concurrency_support(false)
            // under a window it must not; nobody's does, since what is reserved is all that a guest can address
            .memory_may_move(false)
            .epoch_interruption(self.epoch_checks)
            .consume_fuel(self.fuel)
            // else a variable of the environment decides, which a child does not have
            .wasm_backtrace_details(WasmBacktraceDetails::Disable)
            .max_wasm_stack(self.stack.as_usize())
            .async_stack_size(self.stack.as_usize().saturating_add(HOST_STACK));
        if let Some(pool) = self.pool {
            config.allocation_strategy(InstanceAllocationStrategy::Pooling(pool.config()));
        }
        Engine::new(&config)
    }

    /// The most memory that instances of a guest take, in bytes that can be written to: what the engine reserves beyond
    /// that cannot.
    pub(crate) fn instances_data(&self, memory: Bytes, guest: &Inspection) -> u64 {
        // one more, as in `Pool::config`
        let instances = self.pool.map_or(1, |pool| u64::from(pool.instances) + 1);
        // together they are within the limit, but each may keep what it had for the next instance
        let memories = guest.memories + u32::from(guest.has_threads());
        let memories = memories.clamp(1, MEMORIES_MAX) + u32::from(guest.throws);
        let memories = memory.0.saturating_mul(memories.into());
        instances.saturating_mul(memories.saturating_add(self.thread_data()))
    }

    /// What an instance takes beside its memories, which is all that one more of a guest's threads takes.
    pub(crate) fn thread_data(&self) -> u64 {
        let tables = u64::from(TABLES_MAX) * TABLE_ELEMENTS_MAX as u64 * size_of::<usize>() as u64;
        self.stack.0.saturating_add(HOST_STACK as u64).saturating_add(tables)
    }

    /// A hash of all that decides whether packed code fits: how it is packed, the engine's version and flags, this
    /// processor.
    pub(crate) fn fingerprint(engine: &Engine) -> [u8; 32] {
        struct Hash(Sha256);
        impl std::hash::Hasher for Hash {
            fn finish(&self) -> u64 {
                unreachable!("the digest is taken whole")
            }
            fn write(&mut self, bytes: &[u8]) {
                self.0.update(bytes);
            }
        }
        let mut hash = Hash(Sha256::new_with_prefix(MAGIC));
        std::hash::Hash::hash(&engine.precompile_compatibility_hash(), &mut hash);
        hash.0.finalize().into()
    }
}

impl Pool {
    /// A pool with no more than it needs: the engine's default costs 2 ms and 2 GiB of mappings to make.
    fn config(self) -> PoolingAllocationConfig {
        // one more than can be in use, so that a slot can be given back while its successor is made
        let instances = self.instances + 1;
        let mut pool = PoolingAllocationConfig::default();
        pool.total_component_instances(instances)
            .total_core_instances(instances.saturating_mul(CORE_INSTANCES_MAX))
            .total_stacks(instances)
            // and the heap of what is thrown
            .total_memories(instances.saturating_mul(MEMORIES_MAX + 1))
            .total_gc_heaps(instances)
            .total_tables(instances.saturating_mul(TABLES_MAX))
            .max_core_instances_per_component(CORE_INSTANCES_MAX)
            .max_memories_per_component(MEMORIES_MAX)
            .max_tables_per_component(TABLES_MAX)
            // all of them may be of one module
            .max_memories_per_module(MEMORIES_MAX)
            .max_tables_per_module(TABLES_MAX)
            .max_memory_size(self.memory.as_usize())
            .table_elements(TABLE_ELEMENTS_MAX)
            // what a guest wrote is copied back instead of unmapped: no page faults for the next one
            .linear_memory_keep_resident(4 << 20)
            .table_keep_resident(64 << 10)
            .pagemap_scan(Enabled::Auto);
        pool
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_that_is_told_is_the_one_that_is_used() {
        let lock = include_str!("../../Cargo.lock");
        let version = lock.split_once("name = \"wasmtime\"\nversion = \"").expect("it is there").1;
        assert_eq!(ENGINE, format!("wasmtime {}", version.split_once('"').expect("a version").0));
    }
}
