//! The output: bytes, written on a thread of their own.

use std::{
    io::{self, Write},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, Waker},
    thread::JoinHandle,
};

use serde::Serialize;

/// Bytes that may wait to be written before there is no more room.
const WAITING_MAX: usize = 4 << 20;

/// Writes on a thread of its own, so that a slow reader stops the tasks and not the supervision.
pub(crate) struct Writer {
    state: Mutex<WriterState>,
    news: Condvar,
}

#[derive(Default)]
struct WriterState {
    waiting: Vec<u8>,
    closed: bool,
    failed: bool,
    error: Option<io::Error>,
    /// Who waits for room, or for a failure.
    waker: Option<Waker>,
}

impl Writer {
    pub(crate) fn start(output: impl Write + Send + 'static) -> io::Result<(Arc<Self>, JoinHandle<()>)> {
        let writer = Arc::new(Self { state: Mutex::default(), news: Condvar::new() });
        let ours = writer.clone();
        let thread = std::thread::Builder::new().name("wrun-output".into()).spawn(move || ours.run(output))?;
        Ok((writer, thread))
    }

    fn state(&self) -> MutexGuard<'_, WriterState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self, mut output: impl Write) {
        let mut chunk = vec![];
        loop {
            let mut state = self.state();
            while state.waiting.is_empty() && !state.closed {
                state = self.news.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            if state.waiting.is_empty() {
                return;
            }
            chunk.clear();
            std::mem::swap(&mut chunk, &mut state.waiting);
            drop(state);
            let written = output.write_all(&chunk).and_then(|()| output.flush());
            let mut state = self.state();
            if let Err(error) = written {
                (state.failed, state.error) = (true, Some(error));
                // nobody takes it any more
                state.waiting.clear();
            }
            let waker = state.waker.take();
            let failed = state.failed;
            drop(state);
            if let Some(waker) = waker {
                waker.wake();
            }
            if failed {
                return;
            }
        }
    }

    /// Adds bytes to what is written, and empties the buffer that they came in.
    pub(crate) fn write(&self, bytes: &mut Vec<u8>) {
        let mut state = self.state();
        if state.failed {
            bytes.clear();
        } else if state.waiting.is_empty() {
            std::mem::swap(&mut state.waiting, bytes);
        } else {
            state.waiting.append(bytes);
        }
        drop(state);
        self.news.notify_one();
    }

    /// Adds a value as a line of JSON.
    pub(crate) fn line(&self, value: &impl Serialize) {
        let mut line = serde_json::to_vec(value).expect("plain data has a JSON form");
        line.push(b'\n');
        self.write(&mut line);
    }

    pub(crate) fn poll_has_room(&self, cx: &mut Context<'_>) -> Poll<()> {
        let mut state = self.state();
        if state.failed || state.waiting.len() < WAITING_MAX {
            return Poll::Ready(());
        }
        state.waker = Some(cx.waker().clone());
        Poll::Pending
    }

    /// Ready once, when nothing can be written any more.
    pub(crate) fn poll_failed(&self, cx: &mut Context<'_>) -> Poll<()> {
        let mut state = self.state();
        if state.failed && !state.closed {
            state.closed = true;
            return Poll::Ready(());
        }
        state.waker = Some(cx.waker().clone());
        Poll::Pending
    }

    pub(crate) fn close(&self) {
        self.state().closed = true;
        self.news.notify_one();
    }

    pub(crate) fn take_error(&self) -> Option<io::Error> {
        self.state().error.take()
    }
}
