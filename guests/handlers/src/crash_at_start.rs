//! Traps while it is instantiated: no message ever reaches it.

use serde::de::IgnoredAny;
use wrun_guest::handler;

/// What instantiating a component calls in its module. A constructor in `.init_array` would be too late: without this
/// export, constructors run with the first call.
#[unsafe(export_name = "_initialize")]
extern "C" fn initialize() {
    std::process::abort()
}

fn handle(_: IgnoredAny) -> Result<(), String> {
    Ok(())
}

handler!(handle);
