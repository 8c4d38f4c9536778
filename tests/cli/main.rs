//! Drives the real program: one file per feature, all through the builder in [`wrun`].
//!
//! Nothing here sleeps to wait for something, and nothing waits for ever: a program that does not end in time is
//! killed, and its test fails with what was printed.

#![expect(clippy::unwrap_used, reason = "what panics in a test has failed it, in its helpers too")]
#![expect(clippy::format_collect, reason = "inputs are put together where they are read")]

mod apps;
mod bombs;
mod caps;
mod ci;
mod ci_file;
mod ci_hosts;
mod ci_reports;
mod ci_sandbox;
mod ci_schedule;
mod client;
mod cluster;
mod compile;
mod contract;
mod finished;
mod fork;
mod grants;
mod guests;
mod help;
mod http;
mod http_failures;
mod http_framing;
mod http_handlers;
mod http_limits;
mod http_supervision;
mod inspect;
mod jail;
mod limits;
mod load;
mod network;
mod readme;
mod run;
mod spawn;
mod supervision;
mod threads;
mod tidy;
mod watch;
mod watch_router;
mod watch_settings;
mod watch_versions;
mod windows;
mod workers;
mod wrun;
