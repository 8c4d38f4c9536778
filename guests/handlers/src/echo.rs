//! Gives every message back as it is written.

use wrun_guest::handler;

fn handle(message: String) -> Result<Option<String>, String> {
    Ok(Some(message))
}

handler!(raw handle);
