//! The engine: few configurations, chosen by what the guest is and how it is to be interrupted.
//!
//! What is set here decides which compiled code fits ([`EngineSpec::fingerprint`] is part of the cache's names).

use sha2::{Digest, Sha256};
use wasmtime::{Config, Enabled, Engine, InstanceAllocationStrategy, PoolingAllocationConfig};

use crate::{limits::Bytes, sandbox::code::MAGIC};

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

/// Core modules that one component may hold: a plain component of `wasm32-wasip2` has 3, linked languages about 20.
const MODULES_PER_COMPONENT: u32 = 32;

impl EngineSpec {
    /// Makes the engine.
    ///
    /// Threads and WASI 0.3 are off: ordinary guests do not need them, and they are the younger part of the engine.
    pub(crate) fn engine(&self) -> wasmtime::Result<Engine> {
        let mut config = Config::new();
        config
            .wasm_component_model(true)
            .concurrency_support(false)
            .epoch_interruption(self.epoch_checks)
            .consume_fuel(self.fuel)
            .max_wasm_stack(self.stack.as_usize())
            // the guest's stack and as much again for the host calls on top of it as the engine's defaults leave
            .async_stack_size(self.stack.as_usize().saturating_add(3 << 19));
        if let Some(pool) = self.pool {
            config.allocation_strategy(InstanceAllocationStrategy::Pooling(pool.config()));
        }
        Engine::new(&config)
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
        let modules = instances.saturating_mul(MODULES_PER_COMPONENT);
        let mut pool = PoolingAllocationConfig::default();
        pool.total_component_instances(instances)
            .total_core_instances(modules)
            .total_stacks(instances)
            .total_memories(instances.saturating_mul(4))
            .total_tables(instances.saturating_mul(8))
            .max_core_instances_per_component(MODULES_PER_COMPONENT)
            .max_memories_per_component(4)
            .max_tables_per_component(8)
            .max_memory_size(self.memory.as_usize())
            .table_elements(100_000)
            // what a guest wrote is copied back instead of unmapped: no page faults for the next one
            .linear_memory_keep_resident(4 << 20)
            .table_keep_resident(64 << 10)
            .pagemap_scan(Enabled::Auto);
        pool
    }
}
