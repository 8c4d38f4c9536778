//! Gives every message back as it is written.

use wrun_guest::handler;
use wrun_guest::serde_json::value::RawValue;

fn handle(message: Box<RawValue>) -> Result<Box<RawValue>, String> {
    Ok(message)
}

handler!(handle);
