//! What becomes of an app. Pure: what happened goes in, what is to be done comes out.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use super::{
    Event,
    version::{Place, Version},
};
use crate::{
    child::{At, Standing},
    outcome::millis,
};

/// How long a version that went live can still be taken back.
pub(super) const TRIAL: Duration = Duration::from_secs(30);

/// How many crashes within that are one too many.
const CRASHES: u32 = 3;

/// How many versions are remembered that crashed.
const MARKED_MAX: usize = 16;

/// Something to be done.
#[derive(Debug)]
pub(super) enum Act {
    /// Start workers of this version, as the run of this number.
    Start(u64, Arc<Version>),
    /// Send requests to the run of this number, or do with them what fits.
    Route(Option<u64>, Standing),
    /// Know the app no more.
    Unroute,
    /// Let a run end when what it has is done.
    Stop(u64),
    /// End a run now.
    Kill(u64),
    /// Tell the world.
    Tell(Event),
}

/// The workers of one version.
#[derive(Debug)]
pub(super) struct Run {
    pub(super) serial: u64,
    pub(super) version: Arc<Version>,
    /// When it was started, and then when it went live.
    since: Instant,
    crashes: u32,
}

/// A version that is to be live.
#[derive(Debug)]
struct Next {
    run: Run,
    /// It was live before, and what came after it has crashed.
    is_return: bool,
}

/// An app.
#[derive(Debug, Default)]
pub(super) struct App {
    name: String,
    pub(super) live: Option<Run>,
    next: Option<Next>,
    /// What is started when somebody asks for it.
    asleep: Option<Arc<Version>>,
    /// What the version that is live can still be taken back for.
    former: Option<Arc<Version>>,
    /// What was taken over from, until when it may take.
    retiring: Vec<(u64, Instant)>,
    /// Versions that crashed.
    marked: Vec<String>,
    pub(super) error: Option<String>,
    disabled: bool,
    /// Its files are gone.
    gone: bool,
    /// Where it is, or was last.
    pub(super) place: Option<Place>,
    grace: Duration,
}

impl App {
    /// An app of which nothing is known yet; what is taken over from has so long to finish what it has.
    pub(super) fn new(name: &str, grace: Duration) -> Self {
        Self { name: name.into(), grace, ..Self::default() }
    }

    /// How it stands, in a word.
    pub(super) fn state(&self) -> &'static str {
        match self.standing() {
            Standing::Live => "live",
            Standing::Starting => "starting",
            Standing::Asleep => "asleep",
            Standing::Down if self.disabled => "disabled",
            Standing::Down if !self.marked.is_empty() => "failed",
            Standing::Down => "refused",
        }
    }

    /// What is to become of requests for it.
    pub(super) fn standing(&self) -> Standing {
        match self {
            Self { live: Some(_), .. } => Standing::Live,
            Self { next: Some(_), .. } => Standing::Starting,
            Self { asleep: Some(_), .. } => Standing::Asleep,
            _ => Standing::Down,
        }
    }

    /// The version that says where it is: what is live, or would be.
    pub(super) fn version(&self) -> Option<&Arc<Version>> {
        let live = self.live.as_ref().map(|run| &run.version);
        live.or(self.next.as_ref().map(|next| &next.run.version)).or(self.asleep.as_ref())
    }

    /// Whether it is there, or would be when what it is to be is live.
    pub(super) fn is_at(&self, at: &At) -> bool {
        let live = self.live.as_ref().map(|run| &run.version);
        let next = self.next.as_ref().map(|next| &next.run.version);
        [live, next, self.asleep.as_ref()].into_iter().flatten().any(|version| version.at == *at)
    }

    /// Whether its files are there.
    pub(super) fn is_there(&self) -> bool {
        !self.gone
    }

    /// Whether nothing of it is left.
    pub(super) fn is_over(&self) -> bool {
        self.live.is_none() && self.next.is_none() && self.asleep.is_none() && self.retiring.is_empty()
    }

    /// Lets it be taken as if nothing had happened.
    pub(super) fn forgive(&mut self) {
        self.marked.clear();
    }

    /// Its files came to rest, and are this version.
    pub(super) fn offer(&mut self, version: Arc<Version>, serial: u64, lazy: bool, now: Instant) -> Vec<Act> {
        let mut acts = vec![];
        (self.disabled, self.gone) = (false, false);
        let is = |other: &Arc<Version>| other.id == version.id;
        if self.next.as_ref().is_some_and(|next| is(&next.run.version)) || self.asleep.as_ref().is_some_and(is) {
            return acts;
        }
        self.drop_next(&mut acts);
        if self.live.as_ref().is_some_and(|run| is(&run.version)) {
            self.error = None;
            return acts;
        }
        if self.marked.contains(&version.id) {
            let reason = "it crashed again and again when it was live".to_owned();
            self.refuse(Some(version.id.clone()), reason, &mut acts);
            return acts;
        }
        if self.live.is_none() && lazy {
            acts.push(Act::Tell(Event::Asleep { app: self.name.clone(), version: version.id.clone() }));
            self.place = Some(version.place());
            self.asleep = Some(version);
            acts.push(Act::Route(None, Standing::Asleep));
            return acts;
        }
        self.asleep = None;
        self.start(version, serial, false, now, &mut acts);
        acts
    }

    /// Its files are none that can be run.
    pub(super) fn reject(&mut self, version: Option<String>, reason: String) -> Vec<Act> {
        let mut acts = vec![];
        self.gone = false;
        self.drop_next(&mut acts);
        self.refuse(version, reason, &mut acts);
        acts
    }

    /// Its files are gone, or say that it is not to be served.
    pub(super) fn remove(&mut self, disabled: bool, now: Instant) -> Vec<Act> {
        let was = self.version().is_some();
        let mut acts = vec![];
        self.drop_next(&mut acts);
        if let Some(run) = self.live.take() {
            self.retiring.push((run.serial, now + self.grace));
        }
        (self.asleep, self.former, self.error) = (None, None, None);
        (self.disabled, self.gone, self.place) = (disabled, !disabled, None);
        self.marked.clear();
        acts.push(Act::Unroute);
        if was {
            acts.push(Act::Tell(Event::Removed { app: self.name.clone() }));
        }
        acts
    }

    /// Somebody asks for it.
    pub(super) fn wake(&mut self, serial: u64, now: Instant) -> Vec<Act> {
        let mut acts = vec![];
        if let Some(version) = self.asleep.take() {
            self.start(version, serial, false, now, &mut acts);
        }
        acts
    }

    /// All workers of a run are ready.
    pub(super) fn ready(&mut self, serial: u64, now: Instant) -> Vec<Act> {
        let Some(Next { mut run, is_return }) = self.next.take_if(|next| next.run.serial == serial) else {
            return vec![];
        };
        let took_ms = millis(now.duration_since(run.since));
        run.since = now;
        self.place = Some(run.version.place());
        let mut acts = vec![Act::Route(Some(serial), Standing::Live)];
        let version = run.version.id.clone();
        let former = self.live.replace(run);
        if let Some(former) = &former {
            self.retiring.push((former.serial, now + self.grace));
        }
        let former = former.map(|former| former.version);
        let event =
            Event::Live { app: self.name.clone(), version, took_ms, former: former.as_ref().map(|v| v.id.clone()) };
        acts.push(Act::Tell(event));
        if is_return {
            self.former = None;
        } else {
            (self.former, self.error) = (former, None);
        }
        acts
    }

    /// A worker of a run crashed; `serial` is for a run that may have to be started.
    pub(super) fn crashed(&mut self, of: u64, reason: &str, serial: u64, now: Instant) -> Vec<Act> {
        let mut acts = vec![];
        if let Some(next) = self.next.take_if(|next| next.run.serial == of) {
            acts.push(Act::Kill(of));
            self.refuse_next(&next, reason.into(), &mut acts);
        } else if let Some(run) = self.live.as_mut().filter(|run| run.serial == of) {
            run.crashes += 1;
            if run.crashes >= CRASHES {
                self.take_back(reason, serial, now, &mut acts);
            }
        }
        acts
    }

    /// A run has ended, and for this reason when nobody asked for it.
    pub(super) fn ended(&mut self, of: u64, reason: Option<String>, serial: u64, now: Instant) -> Vec<Act> {
        let mut acts = vec![];
        self.retiring.retain(|(serial, _)| *serial != of);
        let reason = reason.unwrap_or_else(|| "it ended".into());
        if let Some(next) = self.next.take_if(|next| next.run.serial == of) {
            self.refuse_next(&next, reason, &mut acts);
        } else if self.live.as_ref().is_some_and(|run| run.serial == of) {
            self.take_back(&reason, serial, now, &mut acts);
            let run = self.live.take().expect("looked at above");
            let is_returning = self.next.is_some();
            acts.push(Act::Route(None, if is_returning { Standing::Starting } else { Standing::Down }));
            if !is_returning {
                self.mark(&run.version.id);
                self.error = Some(reason.clone());
                acts.push(Act::Tell(Event::Failed { app: self.name.clone(), version: run.version.id.clone(), reason }));
            }
        }
        acts
    }

    /// Nothing of a run is in flight any more.
    pub(super) fn idle(&mut self, of: u64) -> Vec<Act> {
        let is_there = self.retiring.iter().any(|(serial, _)| *serial == of);
        if is_there { vec![Act::Stop(of)] } else { vec![] }
    }

    /// Nothing of any run that was taken over from is.
    pub(super) fn all_idle(&mut self) -> Vec<Act> {
        self.retiring.iter().map(|(serial, _)| Act::Stop(*serial)).collect()
    }

    /// Does what is due.
    pub(super) fn tick(&mut self, now: Instant) -> Vec<Act> {
        if self.former.is_some() && self.trial_ends().is_some_and(|end| end <= now) {
            self.former = None;
        }
        let mut acts = vec![];
        for (serial, until) in &mut self.retiring {
            if *until <= now {
                acts.push(Act::Stop(*serial));
                // it was told
                *until = now + 2 * self.grace + Duration::from_secs(1);
            }
        }
        acts
    }

    /// When something will be due.
    pub(super) fn next_due(&self) -> Option<Instant> {
        let trial = self.former.as_ref().and(self.trial_ends());
        self.retiring.iter().map(|(_, until)| *until).chain(trial).min()
    }

    fn trial_ends(&self) -> Option<Instant> {
        self.live.as_ref().map(|run| run.since + TRIAL)
    }

    fn start(&mut self, version: Arc<Version>, serial: u64, is_return: bool, now: Instant, acts: &mut Vec<Act>) {
        if !is_return {
            acts.push(Act::Tell(Event::Starting { app: self.name.clone(), version: version.id.clone() }));
        }
        let run = Run { serial, version: version.clone(), since: now, crashes: 0 };
        self.next = Some(Next { run, is_return });
        acts.push(Act::Start(serial, version));
        if self.live.is_none() {
            self.place = self.next.as_ref().map(|next| next.run.version.place());
            // whoever asks from now on waits
            acts.push(Act::Route(None, Standing::Starting));
        }
    }

    fn drop_next(&mut self, acts: &mut Vec<Act>) {
        if let Some(next) = self.next.take() {
            acts.push(Act::Kill(next.run.serial));
        }
    }

    fn refuse_next(&mut self, next: &Next, reason: String, acts: &mut Vec<Act>) {
        self.refuse(Some(next.run.version.id.clone()), reason, acts);
        if self.live.is_none() {
            acts.push(Act::Route(None, Standing::Down));
        }
    }

    fn refuse(&mut self, version: Option<String>, reason: String, acts: &mut Vec<Act>) {
        self.error = Some(reason.clone());
        acts.push(Act::Tell(Event::Refused { app: self.name.clone(), version, reason }));
    }

    /// Goes back to the version before, if that was not long ago.
    fn take_back(&mut self, reason: &str, serial: u64, now: Instant, acts: &mut Vec<Act>) {
        let Some(former) = self.former.take_if(|_| self.live.as_ref().is_some_and(|run| now < run.since + TRIAL))
        else {
            return;
        };
        let version = self.live.as_ref().map(|run| run.version.id.clone()).unwrap_or_default();
        self.mark(&version);
        self.error = Some(format!("version {version} crashed again and again and was taken back: {reason}"));
        let (app, to, reason) = (self.name.clone(), former.id.clone(), reason.to_owned());
        acts.push(Act::Tell(Event::RolledBack { app, version, to, reason }));
        self.drop_next(acts);
        self.start(former, serial, true, now, acts);
    }

    fn mark(&mut self, id: &str) {
        self.marked.retain(|marked| marked != id);
        self.marked.push(id.into());
        if self.marked.len() > MARKED_MAX {
            self.marked.remove(0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn version(id: &str) -> Arc<Version> {
        Arc::new(Version::for_tests(id))
    }

    /// What is done, in short.
    fn short(acts: &[Act]) -> String {
        let one = |act: &Act| match act {
            Act::Start(serial, version) => format!("start {serial} {}", version.id),
            Act::Route(Some(serial), _) => format!("route {serial}"),
            Act::Route(None, standing) => format!("{standing:?}").to_lowercase(),
            Act::Unroute => "unroute".into(),
            Act::Stop(serial) => format!("stop {serial}"),
            Act::Kill(serial) => format!("kill {serial}"),
            Act::Tell(event) => {
                let event = serde_json::to_value(event).expect("plain data has a JSON form");
                format!("[{}]", event["event"].as_str().expect("a tag"))
            }
        };
        acts.iter().map(one).collect::<Vec<_>>().join(", ")
    }

    const GRACE: Duration = Duration::from_secs(10);

    struct Test(App, Instant);

    impl Test {
        fn new() -> Self {
            Self(App::new("a", GRACE), Instant::now())
        }

        fn at(&self, seconds: u64) -> Instant {
            self.1 + Duration::from_secs(seconds)
        }

        fn offer(&mut self, id: &str, serial: u64, seconds: u64) -> String {
            short(&self.0.offer(version(id), serial, false, self.at(seconds)))
        }

        fn ready(&mut self, serial: u64, seconds: u64) -> String {
            short(&self.0.ready(serial, self.at(seconds)))
        }

        fn crashed(&mut self, of: u64, serial: u64, seconds: u64) -> String {
            short(&self.0.crashed(of, "trap", serial, self.at(seconds)))
        }

        /// With version `a` live since second 0, and `b` since second 1.
        fn replaced() -> Self {
            let mut test = Self::new();
            let _ = (test.offer("a", 1, 0), test.ready(1, 0), test.offer("b", 2, 1));
            assert_eq!(test.ready(2, 1), "route 2, [live]");
            assert_eq!(short(&test.0.idle(1)), "stop 1");
            assert_eq!(short(&test.0.ended(1, None, 9, test.at(1))), "");
            test
        }
    }

    #[test]
    fn a_version_goes_live_beside_the_old_one() {
        let mut test = Test::new();
        assert_eq!(test.0.state(), "refused");
        assert_eq!(test.offer("a", 1, 0), "[starting], start 1 a, starting");
        assert_eq!(test.offer("a", 2, 0), "", "the same");
        assert_eq!(test.ready(1, 1), "route 1, [live]");
        assert_eq!(test.offer("a", 2, 2), "");
        assert_eq!(test.offer("b", 2, 2), "[starting], start 2 b");
        assert_eq!(test.offer("c", 3, 3), "kill 2, [starting], start 3 c", "a newer one");
        assert_eq!(test.ready(2, 4), "", "which is no more");
        assert_eq!(test.ready(3, 4), "route 3, [live]");
        assert_eq!(test.0.state(), "live");
        // the old one ends when nothing of it is in flight, or when its time is over
        assert_eq!(short(&test.0.idle(3)), "", "it is live");
        assert_eq!(test.0.next_due(), Some(test.at(14)));
        assert_eq!(short(&test.0.tick(test.at(13))), "");
        assert_eq!(short(&test.0.tick(test.at(14))), "stop 1");
        assert_eq!(short(&test.0.tick(test.at(15))), "");
    }

    #[test]
    fn what_is_bad_changes_nothing() {
        let mut test = Test::new();
        assert_eq!(short(&test.0.reject(None, "no".into())), "[refused]");
        let _ = test.offer("a", 1, 0);
        assert_eq!(test.crashed(1, 9, 0), "kill 1, [refused], down", "there is none before it");
        let _ = (test.offer("b", 2, 0), test.ready(2, 0));
        assert_eq!(test.0.error, None);
        assert_eq!(short(&test.0.reject(Some("x".into()), "no".into())), "[refused]");
        assert_eq!((test.0.state(), test.0.error.as_deref()), ("live", Some("no")));
        let _ = test.offer("c", 3, 1);
        assert_eq!(short(&test.0.ended(3, Some("no".into()), 9, test.at(1))), "[refused]");
        let _ = test.offer("d", 4, 1);
        assert_eq!(test.crashed(4, 9, 2), "kill 4, [refused]", "one crash before it is live is enough");
        // the file that is live comes back
        assert_eq!(test.offer("b", 5, 3), "");
        assert_eq!(test.0.error, None);
    }

    #[test]
    fn a_new_version_that_crashes_is_taken_back() {
        let mut test = Test::replaced();
        assert_eq!((test.crashed(2, 3, 2), test.crashed(2, 3, 3)), (String::new(), String::new()));
        assert_eq!(test.crashed(2, 3, 4), "[rolled-back], start 3 a");
        assert_eq!(test.crashed(2, 4, 4), "", "once");
        assert_eq!(test.ready(3, 5), "route 3, [live]");
        assert!(test.0.error.as_ref().is_some_and(|error| error.contains("version b crashed")));
        // it is not taken again, but any other is, and the one that is live is no news
        assert_eq!(test.offer("b", 5, 6), "[refused]");
        assert_eq!(test.offer("a", 5, 6), "");
        assert_eq!(test.offer("c", 5, 6), "[starting], start 5 c");
    }

    #[test]
    fn one_whose_workers_are_all_gone_is_taken_back_while_requests_wait() {
        let mut test = Test::replaced();
        let acts = test.0.ended(2, Some("every worker failed".into()), 3, test.at(2));
        assert_eq!(short(&acts), "[rolled-back], start 3 a, starting");
        assert_eq!(test.ready(3, 3), "route 3, [live]");
        // there is nothing behind that one
        assert_eq!(short(&test.0.ended(3, Some("gone".into()), 4, test.at(4))), "down, [failed]");
        assert_eq!(test.0.state(), "failed");
    }

    #[test]
    fn after_its_trial_a_version_stays() {
        let mut test = Test::replaced();
        assert_eq!(test.0.next_due(), Some(test.at(31)));
        let _ = test.0.tick(test.at(31));
        assert_eq!(test.0.next_due(), None);
        for second in 31..40 {
            assert_eq!(test.crashed(2, 3, second), "");
        }
        let mut test = Test::replaced();
        assert_eq!(short(&test.0.ended(2, Some("gone".into()), 3, test.at(31))), "down, [failed]", "before it is told");
    }

    #[test]
    fn one_that_sleeps_is_woken_once() {
        let mut test = Test::new();
        let now = test.1;
        assert_eq!(short(&test.0.offer(version("a"), 1, true, now)), "[asleep], asleep");
        assert_eq!(short(&test.0.offer(version("a"), 1, true, now)), "");
        assert_eq!(short(&test.0.offer(version("b"), 1, true, now)), "[asleep], asleep");
        assert_eq!(short(&test.0.wake(2, now)), "[starting], start 2 b, starting");
        assert_eq!(short(&test.0.wake(3, now)), "");
        assert_eq!(test.ready(2, 1), "route 2, [live]");
        assert_eq!(short(&test.0.offer(version("c"), 3, true, now)), "[starting], start 3 c", "nobody waits for it");
    }

    #[test]
    fn one_that_is_removed_finishes_what_it_has() {
        let mut test = Test::new();
        let _ = (test.offer("a", 1, 0), test.ready(1, 0), test.offer("b", 2, 0));
        assert_eq!(short(&test.0.remove(false, test.at(1))), "kill 2, unroute, [removed]");
        assert!(!test.0.is_over());
        assert_eq!(short(&test.0.idle(1)), "stop 1");
        let _ = test.0.ended(1, None, 9, test.at(2));
        assert!(test.0.is_over());
        // and may come back
        assert_eq!(test.offer("a", 3, 3), "[starting], start 3 a, starting");
        let _ = test.ready(3, 3);
        assert_eq!(short(&test.0.all_idle()), "");
        assert_eq!(short(&test.0.remove(true, test.at(4))), "unroute, [removed]");
        assert_eq!((short(&test.0.all_idle()), test.0.state()), ("stop 3".into(), "disabled"));
    }
}
