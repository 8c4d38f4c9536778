//! Who am I: the worker that this guest runs as.

use serde::de::DeserializeOwned;

pub use crate::bindings::wrun::guest::worker::{Identity, Kind, get_identity as identity};

/// Answers the value that the workers of this pool were started with (`--data`); it is `null` when there is none.
///
/// # Errors
///
/// When the value is not a `T`.
pub fn data<T: DeserializeOwned>() -> serde_json::Result<T> {
    serde_json::from_str(&crate::bindings::wrun::guest::worker::get_data())
}
