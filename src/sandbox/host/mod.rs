//! The host side of `wit/`: one file per interface.

mod http;
mod mailbox;
mod worker;

pub(super) use http::NoOutbound;
pub(crate) use http::{BodyError, GuestBody, Respond, Scheme, Unfinished};
pub(crate) use mailbox::{Full, Mailbox, Received};
pub(crate) use worker::Identity;

pub(crate) mod bindings {
    wasmtime::component::bindgen!({
        path: "wit",
        world: "handler-guest",
        imports: { "wrun:guest/mailbox.receive": async },
        exports: { default: async },
    });
}
