//! What a message through a worker costs, there and back, beside two processes on a bare socket pair.

use std::{cell::RefCell, rc::Rc, time::Instant};

use guest_artifacts::ECHO;
use wrun::{Cluster, cluster::Answer, message::Message};

use crate::harness::{Echo, Node, Probe, compare, pool, time, with_pool};

/// Lengths of messages, and how many of each are sent in a round.
pub(crate) const LENGTHS: [(&str, usize, usize); 4] =
    [("64 B", 64, 20_000), ("1 KiB", 1 << 10, 20_000), ("64 KiB", 64 << 10, 4_000), ("1 MiB", 1 << 20, 200)];

pub(crate) fn run() {
    let mut node = Node::start();
    for (name, length, count) in LENGTHS {
        let count = count / 10;
        let mut echo = Echo::start();
        let per_message = |micros: f64| micros / f64::from(u32::try_from(count).unwrap());
        let mut probes: Vec<Probe<'_>> = vec![("wrun", Box::new(|| per_message(ours(length, count, 1))))];
        probes.push((
            "bare socket pair",
            Box::new(|| per_message(time(|| echo.send(count, length, 1)).as_secs_f64() * 1e6)),
        ));
        if let Some(node) = &mut node {
            probes.push(("Node, `fork`", Box::new(|| per_message(node.ask(&format!("{count} {length} 1"))))));
        }
        compare(&format!("round trip, {name}"), "us", 9, probes);
    }
    for (name, length, count) in LENGTHS {
        let window = if length >= 1 << 20 { 8 } else { 64 };
        let mut echo = Echo::start();
        let per_second = |micros: f64| f64::from(u32::try_from(count).unwrap()) / micros * 1e6;
        let mut probes: Vec<Probe<'_>> = vec![("wrun", Box::new(|| per_second(ours(length, count, window))))];
        probes.push((
            "bare socket pair",
            Box::new(|| per_second(time(|| echo.send(count, length, window)).as_secs_f64() * 1e6)),
        ));
        if let Some(node) = &mut node {
            probes.push(("Node, `fork`", Box::new(|| per_second(node.ask(&format!("{count} {length} {window}"))))));
        }
        compare(&format!("{window} in flight, {name}"), "/s", 9, probes);
    }
}

/// Sends so many messages of a length through one worker, so many at a time; microseconds.
fn ours(length: usize, count: usize, window: usize) -> f64 {
    let message = Message::of(&"x".repeat(length - 2)).unwrap();
    with_pool(pool(ECHO, 1), |cluster| async move {
        let cluster = Rc::new(cluster);
        // made beforehand: a copy of a long message costs as much as its way
        let messages = Rc::new(RefCell::new(vec![message.clone(); count]));
        send_all(&cluster, &Rc::new(RefCell::new(vec![message; 10]))).await;
        let start = Instant::now();
        let mut senders = tokio::task::JoinSet::new();
        for _ in 0..window {
            let (cluster, messages) = (cluster.clone(), messages.clone());
            senders.spawn_local(async move { send_all(&cluster, &messages).await });
        }
        senders.join_all().await;
        start.elapsed().as_secs_f64() * 1e6
    })
}

async fn send_all(cluster: &Cluster, messages: &Rc<RefCell<Vec<Message>>>) {
    loop {
        let Some(message) = messages.borrow_mut().pop() else { return };
        let length = message.as_str().len();
        let Answer::Reply(reply) = cluster.request(message).await.unwrap() else { panic!("no reply") };
        assert_eq!(reply.as_str().len(), length);
    }
}
