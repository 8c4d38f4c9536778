//! The library of [wrun]'s guests.
//!
//! A handler is a function from a message to a reply, and ten lines are a whole guest:
//!
//! ```
//! //! Doubles every number.
//!
//! use wrun_guest::handler;
//!
//! fn handle(numbers: Vec<f64>) -> Result<Vec<f64>, String> {
//!     Ok(numbers.iter().map(|number| number * 2.0).collect())
//! }
//!
//! handler!(handle);
//! ```
//!
//! It is the library of a crate whose `crate-type` is `["cdylib"]`, built with
//! `cargo build --release --target wasm32-wasip2`.
//!
//! - The message is anything that serde deserializes. One that does not fit fails its task, with an error that says
//!   what was expected and what was found.
//! - The reply is anything that serde serializes, and so is the error, which fails this task and no other.
//!   A handler that may end a task without a reply returns `Option<Result<_, _>>`.
//! - [`Box<RawValue>`](serde_json::value::RawValue) takes and gives JSON as it is written: numbers keep their digits
//!   and objects their order. Only the whitespace around a message is not part of it.
//! - A panic traps: it fails the task and drops the instance.
//!
//! The same source builds with `--target wasm32-wasip1-threads` as a module whose workers are threads that share its memory
//! (`wrun threads`): there a `static` is one for all of them, `std::thread` and rayon work, and a panic ends all.
//!
//! [`window`] gives a component ranges of the host's buffers, which are not copied: those of a file that `wrun threads --input`
//! cuts into chunks, and those that its workers were given.
//!
//! [`worker`] tells a guest who it is and [`mailbox`] is its line to its parent. Commands may use both, as long as
//! they are components: a module for `wasm32-wasip1` has no such imports.
//!
//! [wrun]: https://crates.io/crates/wrun

pub mod mailbox;
#[cfg(not(threads))]
pub mod window;
pub mod worker;

mod reply;
#[cfg(threads)]
#[doc(hidden)]
pub mod threads;

pub use reply::IntoReply;
#[doc(hidden)]
pub use reply::answer;
pub use {serde, serde_json};

/// What wit-bindgen generates from wrun's WIT, for guests that do without [`handler!`].
///
/// Such a guest implements [`Guest`](bindings::exports::wrun::guest::handler::Guest) and names its type in
/// `wrun_guest::bindings::export!(Type)`.
#[expect(missing_docs, clippy::same_length_and_capacity, reason = "generated")]
pub mod bindings {
    #[cfg(not(threads))]
    wit_bindgen::generate!({
        path: "../../wit",
        world: "handler-guest",
        pub_export_macro: true,
        default_bindings_module: "wrun_guest::bindings",
    });
    #[cfg(threads)]
    wit_bindgen::generate!({
        path: "../../wit",
        world: "threads-guest",
        pub_export_macro: true,
        default_bindings_module: "wrun_guest::bindings",
    });
}

/// Makes a function the handler of this guest.
///
/// The function takes one message, any type that is [`DeserializeOwned`](serde::de::DeserializeOwned), and returns
/// something that is [`IntoReply`]. A guest has one handler.
///
/// `handler!(raw function)` is for those that do without serde: the function takes the JSON text as it came, a
/// `String`, and returns the texts as they are to go, a `Result<Option<String>, String>`.
#[macro_export]
macro_rules! handler {
    (raw $handle:path) => {
        $crate::export_handler!($handle);
    };
    ($handle:path) => {
        $crate::export_handler!(|message: String| $crate::answer(&message, $handle));
    };
}

/// Exports a handler, from a component.
#[cfg(not(threads))]
#[doc(hidden)]
#[macro_export]
macro_rules! export_handler {
    ($handle:expr) => {
        const _: () = {
            struct Handler;

            impl $crate::bindings::exports::wrun::guest::handler::Guest for Handler {
                fn handle(message: String) -> Result<Option<String>, String> {
                    ($handle)(message)
                }
            }

    $crate::bindings::export!(Handler with_types_in $crate::bindings);
        };
    };
}

/// Exports a handler, from a module whose workers share its memory.
#[cfg(threads)]
#[doc(hidden)]
#[macro_export]
macro_rules! export_handler {
    ($handle:expr) => {
        const _: () = {
            #[unsafe(export_name = "_initialize")]
            extern "C" fn wrun_initialize() {
                $crate::threads::initialize();
            }

            #[unsafe(export_name = "wrun:guest/thread-group@0.1.0#start")]
            extern "C" fn wrun_start(workers: u32) -> u32 {
                $crate::threads::start(workers).into()
            }

            #[unsafe(export_name = "wrun:guest/handler@0.1.0#handle")]
            extern "C" fn wrun_handle(text: *mut u8, length: usize) -> *mut $crate::threads::Returned {
                // SAFETY: by the canonical ABI the host hands over a text in memory that `cabi_realloc` gave it
                let message = unsafe { $crate::threads::lift(text, length) };
                $crate::threads::lower(($handle)(message))
            }

            #[unsafe(export_name = "cabi_post_wrun:guest/handler@0.1.0#handle")]
            extern "C" fn wrun_post(returned: *mut $crate::threads::Returned) {
                // SAFETY: by the canonical ABI the host gives back what `handle` returned, once
                unsafe { $crate::threads::free(returned) };
            }
        };
    };
}
