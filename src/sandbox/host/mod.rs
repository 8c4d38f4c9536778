//! The host side of `wit/`, and what WASI leaves to us: one file per interface.

mod http;
mod mailbox;
mod network;
mod outbound;
mod sockets;
mod tls;
mod window;
mod worker;

pub(crate) use http::{BodyError, GuestBody, Respond, Scheme, Unfinished};
pub(crate) use mailbox::{Full, Mailbox, Received};
pub(crate) use network::Network;
pub(super) use outbound::{Outbound, link as link_outbound};
pub(crate) use sockets::SOCKETS_MAX;
pub(super) use sockets::{Sockets, link as link_sockets};
pub(crate) use tls::Roots;
pub(super) use window::link as link_window;
pub(crate) use worker::Identity;

pub(crate) mod bindings {
    wasmtime::component::bindgen!({
        path: "wit",
        world: "handler-guest",
        imports: { "wrun:guest/mailbox.receive": async },
        exports: { default: async },
    });
}
