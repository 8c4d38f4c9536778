//! Tells the sources whether they are built for threads: `cfg(target_feature = "atomics")` is not to be seen on stable.

use std::env;

fn main() {
    println!("cargo::rustc-check-cfg=cfg(threads)");
    println!("cargo::rerun-if-changed=build.rs");
    if env::var("TARGET").is_ok_and(|target| target == "wasm32-wasip1-threads") {
        println!("cargo::rustc-cfg=threads");
    }
}
