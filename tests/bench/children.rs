//! What a child with a mailbox costs: its start, and its messages, beside Node's `fork` and a bare socket pair.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use guest_artifacts::{COURIER, ECHO};
use wrun::{Cache, Command, Fork, Isolation, message::Message, outcome::Answer};

use crate::{
    harness::{Echo, Node, Probe, cache_dir, compare, time},
    messages::LENGTHS,
};

pub(crate) fn run() {
    let mut node = Node::start();
    starts(node.as_mut());
    for (name, length, count) in LENGTHS {
        round_trips(node.as_mut(), name, length, count / 10);
    }
    for (name, length, count) in LENGTHS {
        many(node.as_mut(), name, length, count, if length >= 1 << 20 { 8 } else { 64 });
    }
    // where there is more to do than one wake-up brings
    for (name, length, count) in &LENGTHS[..2] {
        many(node.as_mut(), name, *length, count * 10, 1_000);
    }
}

fn fork(guest: &str) -> Command {
    let mut command = Command::new(guest);
    command.cache(Cache::at(Some(&cache_dir())));
    command
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
}

fn starts(mut node: Option<&mut Node>) {
    let first_message = |mut command: Command| {
        let start = Instant::now();
        block_on(async {
            let child = command.fork().await.unwrap();
            let Answer::Reply(_) = child.request(&Message::null()).await.unwrap() else { panic!("no reply") };
            start.elapsed().as_secs_f64() * 1e3
        })
    };
    for (what, is_warm) in [("fork to first message, warm", true), ("fork to first message, cold", false)] {
        let command = || {
            let mut command = fork(ECHO);
            if !is_warm {
                command.cache(Cache::none());
            }
            command
        };
        let mut probes: Vec<Probe<'_>> = vec![
            ("wrun", Box::new(|| first_message(command()))),
            (
                "wrun, in the `jail`",
                Box::new(|| {
                    let mut command = command();
                    command.isolation(Isolation::Jail);
                    first_message(command)
                }),
            ),
        ];
        if let Some(node) = &mut node {
            probes.push(("Node, `fork`", Box::new(|| node.ask("fork") / 1e3)));
        }
        compare(what, "ms", 15, probes);
    }
}

/// The figure at this per cent of all.
fn percentile(micros: &mut [f64], percent: usize) -> f64 {
    micros.sort_by(f64::total_cmp);
    micros[(micros.len() * percent / 100).min(micros.len() - 1)]
}

fn round_trips(mut node: Option<&mut Node>, name: &str, length: usize, count: usize) {
    let ours = |guest: &str, percent: usize| {
        let message = Message::of(&"x".repeat(length - 2)).unwrap();
        block_on(async {
            let child = fork(guest).fork().await.unwrap();
            ask(&child, &message).await;
            let mut micros = Vec::with_capacity(count);
            for _ in 0..count {
                let start = Instant::now();
                ask(&child, &message).await;
                micros.push(start.elapsed().as_secs_f64() * 1e6);
            }
            percentile(&mut micros, percent)
        })
    };
    for percent in [50, 99] {
        let mut echo = Echo::start();
        let mut bare = || {
            let trip = |_| time(|| echo.send(1, length, 1)).as_secs_f64() * 1e6;
            percentile(&mut (0..count).map(trip).collect::<Vec<_>>(), percent)
        };
        let mut probes: Vec<Probe<'_>> = vec![
            ("wrun, a handler", Box::new(|| ours(ECHO, percent))),
            ("wrun, a command", Box::new(|| ours(COURIER, percent))),
            ("bare socket pair", Box::new(&mut bare)),
        ];
        if let Some(node) = &mut node {
            probes.push(("Node, `fork`", Box::new(|| node.ask(&format!("{count} {length} 1 {percent}")))));
        }
        compare(&format!("fork, round trip, {name}, p{percent}"), "us", 7, probes);
    }
}

async fn ask(child: &Fork, message: &Message) {
    child.send(message).unwrap();
    assert_eq!(child.recv().await.unwrap().as_str().len(), message.as_str().len());
}

fn many(mut node: Option<&mut Node>, name: &str, length: usize, count: usize, window: usize) {
    let per_second = |took: Duration| f64::from(u32::try_from(count).unwrap()) / took.as_secs_f64();
    let ours = |guest: &str| {
        let message = Message::of(&"x".repeat(length - 2)).unwrap();
        block_on(async {
            let child = Arc::new(fork(guest).fork().await.unwrap());
            ask(&child, &message).await;
            let start = Instant::now();
            let (mut sent, mut received) = (0, 0);
            while received < count {
                while sent < count && sent - received < window {
                    child.ready().await;
                    child.send(&message).unwrap();
                    sent += 1;
                }
                // all that have come before more are sent
                assert!(child.recv().await.is_some());
                received += 1;
                while let Some(message) = child.try_recv() {
                    assert_eq!(message.as_str().len(), length);
                    received += 1;
                }
            }
            per_second(start.elapsed())
        })
    };
    let mut echo = Echo::start();
    let mut probes: Vec<Probe<'_>> = vec![
        ("wrun, a handler", Box::new(|| ours(ECHO))),
        ("wrun, a command", Box::new(|| ours(COURIER))),
        ("bare socket pair", Box::new(|| per_second(time(|| echo.send(count, length, window))))),
    ];
    if let Some(node) = &mut node {
        probes.push((
            "Node, `fork`",
            Box::new(|| per_second(Duration::from_secs_f64(node.ask(&format!("{count} {length} {window}")) / 1e6))),
        ));
    }
    compare(&format!("fork, {window} in flight, {name}"), "/s", 7, probes);
}
