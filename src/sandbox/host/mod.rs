//! The host side of `wit/`: one file per interface.

mod mailbox;
mod worker;

pub(crate) use mailbox::{Outbox, SendRefused};
pub(crate) use worker::Identity;

#[expect(missing_docs, clippy::pedantic, unreachable_pub, reason = "generated; the WIT has the docs")]
pub(crate) mod bindings {
    wasmtime::component::bindgen!({
        path: "wit",
        world: "handler-guest",
        imports: { "wrun:guest/mailbox.receive": async },
        exports: { default: async },
    });
}
