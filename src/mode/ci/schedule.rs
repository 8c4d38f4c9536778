//! What is started when: which jobs may run, in which order, which are tried again, and which are given up. Pure: the clock
//! is handed in, and what to do comes out.

use std::{
    collections::{BTreeSet, HashSet},
    time::{Duration, Instant},
};

use super::{
    file::When,
    graph,
    plan::{Job, Retries},
    record::Status,
};

/// What the schedule knows of a job.
#[derive(Debug)]
struct Node {
    needs: Vec<usize>,
    dependents: Vec<usize>,
    when: When,
    serial: Option<String>,
    allow_failure: bool,
    retries: Retries,
    /// How many of those that it needs have not ended.
    unmet: usize,
    state: State,
    /// The number of its last attempt.
    attempt: u32,
    failures: u32,
    infra_failures: u32,
    end: Option<Status>,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum State {
    /// It is not part of the run.
    Absent,
    Waiting,
    Ready,
    Running,
    /// It is tried again then.
    Pausing(Instant),
    Ended,
}

/// What comes of what has happened.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Act {
    /// A job's attempt has failed, and another one follows.
    Retry { job: usize, after: Duration },
    /// A job is over, in that way, and for that reason when it was not started or was given up.
    End { job: usize, status: Status, reason: Option<String> },
}

/// All jobs of a run, and how far they are.
#[derive(Debug)]
pub(super) struct Schedule {
    nodes: Vec<Node>,
    names: Vec<String>,
    slots: usize,
    max_fail: Option<u32>,
    infra_retries: u32,
    running: usize,
    failed: u32,
    serial: HashSet<String>,
    /// Those that may start: the longest way to the end first, then the order of the file.
    ready: BTreeSet<(std::cmp::Reverse<Duration>, usize)>,
    pausing: BTreeSet<(Instant, usize)>,
    critical: Vec<Duration>,
    /// Why nothing is started any more.
    closed: Option<(Status, String)>,
}

impl Schedule {
    /// Of the jobs that are chosen; `durations` is how long each is thought to take.
    pub(super) fn new(
        jobs: &[Job],
        chosen: &[bool],
        (slots, max_fail, infra_retries): (u32, Option<u32>, u32),
        durations: &[Duration],
    ) -> (Self, Vec<Act>) {
        let needs: Vec<_> = jobs.iter().map(|job| job.needs.clone()).collect();
        let mut dependents = graph::dependents(&needs);
        let node = |(at, job): (usize, &Job)| Node {
            needs: job.needs.clone(),
            dependents: std::mem::take(&mut dependents[at]),
            when: job.when,
            serial: job.serial.clone(),
            allow_failure: job.allow_failure,
            retries: job.retries,
            unmet: job.needs.len(),
            state: if chosen[at] { State::Waiting } else { State::Absent },
            attempt: 0,
            failures: 0,
            infra_failures: 0,
            end: None,
        };
        let mut schedule = Self {
            nodes: jobs.iter().enumerate().map(node).collect(),
            names: jobs.iter().map(|job| job.name.clone()).collect(),
            slots: slots as usize,
            max_fail,
            infra_retries,
            running: 0,
            failed: 0,
            serial: HashSet::new(),
            ready: BTreeSet::new(),
            pausing: BTreeSet::new(),
            critical: graph::critical(&needs, durations),
            closed: None,
        };
        let mut acts = vec![];
        for at in 0..schedule.nodes.len() {
            if schedule.nodes[at].state == State::Waiting && schedule.nodes[at].unmet == 0 {
                match schedule.refusal(at) {
                    None => schedule.make_ready(at),
                    Some(reason) => schedule.end(at, Status::Skipped, Some(reason), &mut acts),
                }
            }
        }
        (schedule, acts)
    }

    /// The next job to be started now, with the number of its attempt; none when none can be.
    pub(super) fn start(&mut self, now: Instant) -> Option<(usize, u32)> {
        if self.closed.is_some() || self.running >= self.slots {
            return None;
        }
        while let Some((at, job)) = self.pausing.first().copied().filter(|(at, _)| *at <= now) {
            self.pausing.remove(&(at, job));
            self.make_ready(job);
        }
        let is_free = |(_, job): &&(_, usize)| {
            self.nodes[*job].serial.as_ref().is_none_or(|serial| !self.serial.contains(serial))
        };
        let next = *self.ready.iter().find(is_free)?;
        self.ready.remove(&next);
        let node = &mut self.nodes[next.1];
        node.state = State::Running;
        node.attempt += 1;
        self.running += 1;
        self.serial.extend(node.serial.clone());
        Some((next.1, node.attempt))
    }

    /// When there may be something to start although nothing has happened.
    pub(super) fn next_due(&self) -> Option<Instant> {
        self.pausing.first().map(|(at, _)| *at).filter(|_| self.closed.is_none())
    }

    /// An attempt has ended; `chance` is between 0 and 1.
    pub(super) fn ended(&mut self, job: usize, status: Status, now: Instant, chance: f64) -> Vec<Act> {
        let node = &mut self.nodes[job];
        self.running -= 1;
        if let Some(serial) = &node.serial {
            self.serial.remove(serial);
        }
        let mut acts = vec![];
        let pause = match status {
            Status::Infra if node.infra_failures < self.infra_retries => {
                node.infra_failures += 1;
                Some(Duration::ZERO)
            }
            // another attempt would end the same way
            Status::Infra | Status::Compile | Status::Cancelled => None,
            status if status.is_bad() && node.failures < node.retries.count => {
                node.failures += 1;
                Some(node.retries.pause(node.failures, chance))
            }
            _ => None,
        };
        if let Some(after) = pause.filter(|_| self.closed.is_none()) {
            node.state = State::Pausing(now + after);
            self.pausing.insert((now + after, job));
            acts.push(Act::Retry { job, after });
        } else {
            let status = if status == Status::Pass && node.attempt > 1 { Status::Flaky } else { status };
            self.end(job, status, None, &mut acts);
        }
        acts
    }

    /// Starts nothing any more; what has not ended and does not run ends so.
    pub(super) fn close(&mut self, status: Status, reason: &str) -> Vec<Act> {
        let mut acts = vec![];
        self.close_into(status, reason, &mut acts);
        acts
    }

    fn close_into(&mut self, status: Status, reason: &str, acts: &mut Vec<Act>) {
        if self.closed.is_some() {
            return;
        }
        self.closed = Some((status, reason.into()));
        (self.ready, self.pausing) = (BTreeSet::new(), BTreeSet::new());
        for (job, node) in self.nodes.iter_mut().enumerate() {
            if matches!(node.state, State::Waiting | State::Ready | State::Pausing(_)) {
                node.state = State::Ended;
                node.end = Some(status);
                acts.push(Act::End { job, status, reason: Some(reason.into()) });
            }
        }
    }

    /// Whether all jobs are over.
    pub(super) fn is_over(&self) -> bool {
        self.running == 0 && self.ready.is_empty() && self.pausing.is_empty()
    }

    fn make_ready(&mut self, job: usize) {
        self.nodes[job].state = State::Ready;
        self.ready.insert((std::cmp::Reverse(self.critical[job]), job));
    }

    /// All that a job needs has ended: why it is not started, if it is not.
    fn refusal(&self, job: usize) -> Option<String> {
        let node = &self.nodes[job];
        // whoever may fail is as good as well
        let is_well = |need: &usize| {
            let need = &self.nodes[*need];
            need.end.is_some_and(|end| end.is_good() || end.is_bad() && need.allow_failure)
        };
        let unwell = node.needs.iter().find(|need| !is_well(need));
        let failed = node.needs.iter().any(|need| self.nodes[*need].end.is_some_and(Status::is_bad));
        match (node.when, unwell) {
            (When::Success, Some(need)) => {
                let end = self.nodes[*need].end.map_or("", Status::word);
                Some(format!("it needs `{}`, which ended with {end}", self.names[*need]))
            }
            (When::Failure, _) if !failed => Some("it is for when what it needs fails, and nothing did".into()),
            _ => None,
        }
    }

    fn end(&mut self, job: usize, status: Status, reason: Option<String>, acts: &mut Vec<Act>) {
        // who waits for a job that is skipped may be skipped, too, and so on
        let mut ended = vec![(job, status, reason)];
        while let Some((job, status, reason)) = ended.pop() {
            let node = &mut self.nodes[job];
            (node.state, node.end) = (State::Ended, Some(status));
            self.failed += u32::from(status.is_bad() && !node.allow_failure);
            acts.push(Act::End { job, status, reason });
            for dependent in self.nodes[job].dependents.clone() {
                let node = &mut self.nodes[dependent];
                node.unmet -= 1;
                if node.unmet == 0 && node.state == State::Waiting {
                    match self.refusal(dependent) {
                        None => self.make_ready(dependent),
                        Some(reason) => ended.push((dependent, Status::Skipped, Some(reason))),
                    }
                }
            }
        }
        if self.max_fail.is_some_and(|max| self.failed >= max) {
            let reason = format!("{} failed before, and `fail-fast` is set", self.failed);
            self.close_into(Status::Skipped, &reason, acts);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::mode::ci::{file::JobFile, plan::Plan};

    struct Test {
        schedule: Schedule,
        jobs: Vec<Job>,
        acts: Vec<Act>,
        begin: Instant,
    }

    impl Test {
        fn of(text: &str, slots: u32, max_fail: Option<u32>) -> Self {
            let text = format!("version = 1\n{text}");
            let file = JobFile::read(&text, None).expect("a job file");
            let jobs = Plan::of(file, &text, Path::new("/x")).expect("a plan").jobs;
            let durations = vec![Duration::from_secs(1); jobs.len()];
            let (schedule, acts) = Schedule::new(&jobs, &vec![true; jobs.len()], (slots, max_fail, 1), &durations);
            Self { schedule, jobs, acts, begin: Instant::now() }
        }

        /// All that can be started after so many seconds.
        fn start(&mut self, seconds: u64) -> Vec<&str> {
            let now = self.begin + Duration::from_secs(seconds);
            let started: Vec<_> = std::iter::from_fn(|| self.schedule.start(now)).collect();
            started.into_iter().map(|(job, _)| self.jobs[job].name.as_str()).collect()
        }

        fn end(&mut self, name: &str, status: Status) -> Vec<String> {
            let job = self.jobs.iter().position(|job| job.name == name).expect("a job");
            let acts = self.schedule.ended(job, status, self.begin, 0.0);
            acts.iter().map(|act| self.word(act)).collect()
        }

        fn word(&self, act: &Act) -> String {
            match act {
                Act::Retry { job, after } => format!("{} again in {after:?}", self.jobs[*job].name),
                Act::End { job, status, .. } => format!("{} {}", self.jobs[*job].name, status.word()),
            }
        }
    }

    fn job(id: &str, rest: &str) -> String {
        format!("[[job]]\nid = '{id}'\nwasm = 'x'\n{rest}\n")
    }

    #[test]
    fn jobs_wait_for_what_they_need_and_the_longest_way_goes_first() {
        let text = job("lone", "") + &job("a", "") + &job("b", "needs = ['a']") + &job("c", "needs = ['b']");
        let mut run = Test::of(&text, 2, None);
        assert_eq!(run.start(0), ["a", "lone"]);
        assert_eq!(run.start(0), [""; 0]);
        assert_eq!(run.end("a", Status::Pass), ["a pass"]);
        assert_eq!(run.start(0), ["b"]);
        assert_eq!(run.end("b", Status::Trap), ["b trap", "c skipped"]);
        assert!(!run.schedule.is_over());
        run.end("lone", Status::Pass);
        assert!(run.schedule.is_over());
    }

    #[test]
    fn when_says_after_which_end_a_job_runs() {
        let text = job("a", "allow-failure = true")
            + &job("b", "")
            + &job("ok", "needs = ['a']")
            + &job("no", "needs = ['b']")
            + &job("always", "needs = ['b', 'no']\nwhen = 'always'")
            + &job("failure", "needs = ['b']\nwhen = 'failure'")
            + &job("other", "needs = ['ok']\nwhen = 'failure'");
        let mut run = Test::of(&text, 9, None);
        assert_eq!(run.start(0), ["a", "b"]);
        assert_eq!(run.end("a", Status::Fail), ["a fail"]);
        assert_eq!(run.end("b", Status::Fail), ["b fail", "no skipped"]);
        assert_eq!(run.start(0), ["ok", "always", "failure"]);
        assert_eq!(run.end("ok", Status::Pass), ["ok pass", "other skipped"]);
    }

    #[test]
    fn failures_are_tried_again_after_a_pause() {
        let again = "retries = { count = 2, backoff = 'exponential', delay = '2s', max-delay = '3s' }";
        let mut run = Test::of(&(job("a", again) + &job("b", "")), 1, None);
        assert_eq!(run.start(0), ["a"]);
        assert_eq!(run.end("a", Status::Fail), ["a again in 2s"]);
        assert_eq!(run.schedule.next_due(), Some(run.begin + Duration::from_secs(2)));
        assert_eq!(run.start(1), ["b"]);
        run.end("b", Status::Pass);
        assert_eq!(run.start(1), [""; 0]);
        assert_eq!(run.start(2), ["a"]);
        assert_eq!(run.end("a", Status::Timeout), ["a again in 3s"]);
        assert_eq!(run.start(9), ["a"]);
        assert_eq!(run.end("a", Status::Pass), ["a flaky"]);
        // what wrun is to blame for has tries of its own, what no try would mend has none
        let mut run = Test::of(&(job("a", "retries = 1") + &job("b", "retries = 1")), 1, None);
        assert_eq!(run.start(0), ["a"]);
        assert_eq!(run.end("a", Status::Infra), ["a again in 0ns"]);
        assert_eq!(run.start(0), ["a"]);
        assert_eq!(run.end("a", Status::Infra), ["a infra"]);
        assert_eq!(run.start(0), ["b"]);
        assert_eq!(run.end("b", Status::Compile), ["b compile"]);
    }

    #[test]
    fn jobs_of_one_serial_word_do_not_overlap() {
        let text = job("a", "serial = 's'") + &job("b", "serial = 's'") + &job("c", "serial = 't'");
        let mut run = Test::of(&text, 3, None);
        assert_eq!(run.start(0), ["a", "c"]);
        run.end("a", Status::Pass);
        assert_eq!(run.start(0), ["b"]);
    }

    #[test]
    fn nothing_is_started_after_too_many_failures_or_the_end() {
        let text = job("a", "retries = 1") + &job("b", "allow-failure = true") + &job("c", "") + &job("d", "");
        let mut run = Test::of(&text, 3, Some(1));
        assert_eq!(run.start(0), ["a", "b", "c"]);
        assert_eq!(run.end("b", Status::Fail), ["b fail"]);
        assert_eq!(run.end("c", Status::Fail), ["c fail", "d skipped"]);
        // what runs may end, and is not tried again
        assert_eq!(run.end("a", Status::Fail), ["a fail"]);
        assert!(run.acts.is_empty() && run.schedule.is_over());
        let mut run = Test::of(&text, 1, None);
        assert_eq!(run.start(0), ["a"]);
        assert_eq!(run.end("a", Status::Fail), ["a again in 0ns"]);
        let closed = run.schedule.close(Status::Cancelled, "stopped");
        let words: Vec<_> = closed.iter().map(|act| run.word(act)).collect();
        assert_eq!(words, ["a cancelled", "b cancelled", "c cancelled", "d cancelled"]);
        assert!(run.schedule.is_over() && run.start(9).is_empty());
    }

    #[test]
    fn a_long_chain_is_given_up_without_depth() {
        let chain = (1..5000).map(|at| job(&format!("j{at}"), &format!("needs = ['j{}']", at - 1)));
        let mut run = Test::of(&(job("j0", "") + &chain.collect::<String>()), 1, None);
        assert_eq!(run.start(0), ["j0"]);
        assert_eq!(run.end("j0", Status::Fail).len(), 5000);
    }
}
