//! Prints its arguments and its environment as one line of JSON.

use std::collections::BTreeMap;
use std::env;

use serde::Serialize;

#[derive(Serialize)]
struct World {
    args: Vec<String>,
    env: BTreeMap<String, String>,
}

fn main() -> serde_json::Result<()> {
    let world = World { args: env::args().collect(), env: env::vars().collect() };
    println!("{}", serde_json::to_string(&world)?);
    Ok(())
}
