//! A folder while it is watched: its files, its apps and the router, on one thread.

use std::{
    cell::Cell,
    collections::{BTreeMap, HashMap, VecDeque},
    future::poll_fn,
    io,
    os::fd::OwnedFd,
    path::absolute,
    sync::{Arc, Mutex, PoisonError},
    task::Poll,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use serde_json::to_vec;
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::{Semaphore, mpsc},
    task::{AbortHandle, LocalSet},
};

use super::{
    Builder, Event,
    app::{Act, App},
    folder::{ENDINGS, Ears, Folder, There, age, app_of, is_meant},
    router::{Told, router, told_by},
    settle::Settle,
    version::{Place, Version, names, shadowed},
};
use crate::{
    Error,
    child::{At, Entry, Listing, Route, Standing, cores},
    event,
    mode::cluster::{End, Order, Stop},
    outcome::millis,
    process::{Isolation, channel, port, raise_descriptors, runtime, wire::Kind},
    signal::Signals,
    supervisor::{Step, Supervisor},
};

/// How often the folder is looked at when events come, in case some were lost ...
const LOOK_SELDOM: Duration = Duration::from_secs(2);

/// ... and when none come, unless somebody has said how often.
const LOOK_OFTEN: Duration = Duration::from_millis(500);

/// How long between two looks, however many events come.
const LOOK_PAUSE: Duration = Duration::from_millis(20);

/// The router's slot.
const ROUTER: event::WorkerId = 1;

/// Serves a folder until SIGINT or SIGTERM; SIGHUP tries all of it again. Events go to `events`.
///
/// ```no_run
/// use wrun::{cluster, watch};
///
/// wrun::init(); // workers are this program, started again
/// let apps = cluster::Builder::for_apps().workers(2);
/// let folder = watch::Builder::new("apps", "127.0.0.1:8080".parse()?, apps);
/// watch::run(folder, |event| eprintln!("{event:?}"))?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
///
/// # Errors
/// When the folder cannot be read, the address cannot be listened on, or the router failed again and again.
///
/// # Panics
/// Inside of a tokio runtime: it blocks.
pub fn run(builder: Builder, events: impl FnMut(Event)) -> Result<End, Error> {
    raise_descriptors();
    let runtime = runtime()?;
    runtime.block_on(LocalSet::new().run_until(watch(builder, events)))
}

/// What the parts tell the whole.
enum News {
    /// Something happened in a run.
    Event(u64, event::Event),
    /// A run has ended, and for this reason when that was no success.
    Ended(u64, Option<String>),
    /// Something happened to the router.
    Router(event::Event),
}

/// The workers of one version, from here.
struct Running {
    app: String,
    version: String,
    workers: u32,
    /// Slots whose worker is ready.
    online: Vec<event::WorkerId>,
    /// The router's end of their channel.
    channel: OwnedFd,
    orders: mpsc::UnboundedSender<Order>,
    task: AbortHandle,
    since_ms: Option<u64>,
}

/// A folder that is watched.
struct Watched<F> {
    builder: Builder,
    folder: Folder,
    there: There,
    settle: Settle,
    apps: BTreeMap<String, App>,
    runs: HashMap<u64, Running>,
    serial: Cell<u64>,
    router: Supervisor,
    /// How often the router was told where requests go, and how many of these changes hold.
    changes: u64,
    changed: u64,
    /// What is told when the changes before it hold, with how many those are; none before the list is made of them.
    untold: VecDeque<(Option<u64>, Event)>,
    listing: Listing,
    /// Whether something has changed since that was made.
    is_stale: bool,
    /// Apps that were not taken since another one is where they would be.
    displaced: BTreeMap<String, At>,
    compiling: Arc<Semaphore>,
    news: mpsc::UnboundedSender<News>,
    /// What was told of files that are not used.
    ignored: BTreeMap<String, String>,
    /// Why the folder could not be read last.
    trouble: Option<String>,
    tell: F,
}

async fn watch<F: FnMut(Event)>(builder: Builder, tell: F) -> Result<End, Error> {
    if builder.isolation == Isolation::Thread {
        let expected = "apps and the router are processes: expected `process` or `jail` for their isolation";
        return Err(Error::Usage(expected.into()));
    }
    let path = absolute(&builder.folder).map_err(Error::io("find the folder"))?;
    let folder = Folder { path };
    std::fs::read_dir(&folder.path).map_err(Error::io("read the folder"))?;
    let mut signals = Signals::new().map_err(Error::io("listen for signals"))?;
    let mut hangup = signal(SignalKind::hangup()).map_err(Error::io("listen for signals"))?;
    let (news, mut came) = mpsc::unbounded_channel();
    let listener = bind(&builder)?;
    // until it is told
    let mut address = Some(port::address_of(&listener).map_err(Error::io("look at the port"))?);
    let listener = Arc::new(Mutex::new(Some(listener)));
    let told = news.clone();
    // nobody hears it any more when all is over
    let sink = Box::new(move |event| _ = told.send(News::Router(event)));
    let router = router(&builder, listener.clone(), sink);
    let mut watched = Watched::new(builder, folder, router, news, tell);
    let mut ears = Ears::new();
    let mut has_events = watched.attach(&mut ears);
    watched.begin();
    let mut looked = Instant::now();
    let mut look_at = None::<Instant>;
    let mut stopped: Option<i32> = None;
    loop {
        if stopped.is_none() {
            watched.settle();
        }
        watched.list();
        watched.router.flush();
        let often = watched.builder.poll.unwrap_or(if has_events { LOOK_SELDOM } else { LOOK_OFTEN });
        let due = [look_at, watched.next_due()].into_iter().flatten().chain([looked + often]).min();
        let due = due.expect("there is a next look");
        tokio::select! {
            biased;
            signal = poll_fn(|cx| signals.poll(cx)) => {
                if stopped.replace(signal).is_some() {
                    return Ok(End::Stopped { signal, killed: true });
                }
                // whoever comes from now on is refused, and does not wait for nobody
                listener.lock().unwrap_or_else(PoisonError::into_inner).take();
                watched.router.drain();
            }
            _ = hangup.recv(), if stopped.is_none() => {
                look_at = Some(Instant::now());
                watched.reconsider_all();
            }
            Some(news) = came.recv() => {
                watched.hear(news);
                // all that has come, before anything is looked at again
                while let Ok(news) = came.try_recv() {
                    watched.hear(news);
                }
            }
            step = poll_fn(|cx| watched.poll_router(cx)) => match step {
                Step::Down(Some(last)) => return Err(Error::of_pool(Error::PoolFailed { last })),
                Step::Down(None) => {
                    let signal = stopped.unwrap_or_default();
                    let killed = watched.router.grace_exceeded() | watched.end_all(&mut came).await;
                    return Ok(End::Stopped { signal, killed });
                }
                Step::Online(_) => {
                    watched.introduce();
                    if let Some(address) = address.take() {
                        watched.tell(Event::Listening { address });
                    }
                }
                Step::Gone { .. } => watched.forget_in_flight(),
                _ => {}
            },
            () = ears.changed(), if watched.builder.poll.is_none() => {
                look_at.get_or_insert(looked + LOOK_PAUSE);
            }
            () = tokio::time::sleep_until(due.into()) => {}
        }
        let now = Instant::now();
        if stopped.is_none() && (look_at.is_some_and(|at| at <= now) || looked + often <= now) {
            (looked, look_at) = (now, None);
            has_events = watched.attach(&mut ears);
            watched.look(&ears);
        }
        watched.tick();
    }
}

fn bind(builder: &Builder) -> Result<OwnedFd, Error> {
    let address = builder.listen;
    port::bind(address, false).map_err(|source| Error::Listen { address, source })
}

impl<F: FnMut(Event)> Watched<F> {
    fn new(builder: Builder, folder: Folder, router: Supervisor, news: mpsc::UnboundedSender<News>, tell: F) -> Self {
        Self {
            folder,
            there: There::default(),
            settle: Settle::default(),
            apps: BTreeMap::new(),
            runs: HashMap::new(),
            serial: Cell::new(0),
            router,
            changes: 0,
            changed: 0,
            untold: VecDeque::new(),
            listing: Listing::default(),
            is_stale: false,
            displaced: BTreeMap::new(),
            compiling: Arc::new(Semaphore::new(cores() as usize)),
            news,
            ignored: BTreeMap::new(),
            trouble: None,
            tell,
            builder,
        }
    }

    /// Tells the world, when what was to be changed before holds: whoever hears that a version is live finds it so.
    fn tell(&mut self, event: Event) {
        self.untold.push_back(((!self.is_stale).then_some(self.changes), event));
        self.tell_what_holds();
    }

    /// So many changes hold.
    fn note_changed(&mut self, changed: u64) {
        self.changed = self.changed.max(changed.min(self.changes));
        self.tell_what_holds();
    }

    fn tell_what_holds(&mut self) {
        let holds = |(after, _): &mut (Option<u64>, Event)| after.is_some_and(|after| after <= self.changed);
        while let Some((_, event)) = self.untold.pop_front_if(holds) {
            (self.tell)(event);
        }
    }

    fn next_serial(&self) -> u64 {
        self.serial.set(self.serial.get() + 1);
        self.serial.get()
    }

    /// Whether events come from the folder.
    fn attach(&mut self, ears: &mut Ears) -> bool {
        if self.builder.poll.is_some() {
            return false;
        }
        ears.attach(&self.folder).unwrap_or_else(|error| {
            tracing::debug!("no events come from the folder: {error}");
            false
        })
    }

    /// Looks at the folder for the first time.
    fn begin(&mut self) {
        self.there = self.read_folder().unwrap_or_default();
        let aged = self.there.files.iter().map(|(name, stamp)| (name.clone(), (*stamp, age(stamp))));
        self.settle.begin(&aged.collect(), Instant::now());
        self.tell_ignored();
    }

    /// Looks at the folder, with what was heard of it.
    fn look(&mut self, ears: &Ears) {
        let now = Instant::now();
        let news = ears.news();
        if news.lost {
            self.settle.forget_heard();
        }
        for (name, heard) in news.heard {
            if app_of(&name).is_ok() {
                self.settle.hear(&name, heard, now);
            }
        }
        // one that cannot be read says nothing of what is in it
        let Some(there) = self.read_folder() else { return };
        self.there = there;
        self.settle.look(&self.there.files, now);
        self.tell_ignored();
    }

    fn read_folder(&mut self) -> Option<There> {
        let looked = self.folder.look().map_err(|error| format!("could not read the folder: {error}"));
        let trouble = looked.as_ref().err().cloned();
        // once, and not with each look
        if trouble != self.trouble
            && let Some(message) = trouble.clone()
        {
            self.tell(Event::Error { message });
        }
        self.trouble = trouble;
        looked.ok()
    }

    fn tell_ignored(&mut self) {
        let shadowed = shadowed(&self.there).map(|(file, reason)| (file, reason.to_owned()));
        let ignored = self.there.ignored.clone().into_iter().chain(shadowed);
        let ignored: BTreeMap<_, _> = ignored.filter(|(file, _)| is_meant(file)).collect();
        let known = std::mem::replace(&mut self.ignored, ignored.clone());
        for (file, reason) in ignored.into_iter().filter(|(file, _)| !known.contains_key(file)) {
            self.tell(Event::Ignored { file, reason });
        }
    }

    /// Takes up what has come to rest.
    fn settle(&mut self) {
        let now = Instant::now();
        let settled = self.settle.settled(now);
        let mut apps: Vec<&str> = settled.iter().filter_map(|file| app_of(file).ok()).collect();
        apps.sort_unstable();
        apps.dedup();
        for name in &apps {
            // all of its files, or none
            let is_pending = |ending: &&str| self.settle.is_pending(&format!("{name}.{ending}"));
            if !ENDINGS.iter().any(is_pending) {
                self.reconsider(name, now);
            }
        }
        // perhaps there is room for them now
        let is_free = |(name, at): &(&String, &At)| self.taken(name, at).is_none();
        let free: Vec<_> = self.displaced.iter().filter(is_free).map(|(name, _)| name.clone()).collect();
        for name in free {
            self.displaced.remove(&name);
            self.reconsider(&name, now);
        }
    }

    /// Takes all apps as their files are, whatever was made of them before.
    fn reconsider_all(&mut self) {
        self.apps.values_mut().for_each(App::forgive);
        let names: Vec<String> = names(&self.there).map(str::to_owned).collect();
        for name in names {
            self.reconsider(&name, Instant::now());
        }
    }

    /// Takes an app as its files are now.
    fn reconsider(&mut self, name: &str, now: Instant) {
        self.displaced.remove(name);
        self.is_stale = true;
        let grace = self.builder.grace;
        if !self.there.has(name) {
            let Some(app) = self.apps.get_mut(name) else { return };
            let acts = app.remove(false, now);
            return self.act(name, acts);
        }
        let read = Version::read(&self.folder, &self.there, name, &self.builder.apps);
        // one that changes comes to rest again
        let Some(read) = read.transpose() else { return };
        let taken = read.as_ref().ok().and_then(|version| self.taken(name, &version.at));
        let serial = self.next_serial();
        let app = self.apps.entry(name.into()).or_insert_with(|| App::new(name, grace));
        let acts = match read {
            Err(reason) => app.reject(None, reason),
            Ok(version) if version.settings.disabled => app.remove(true, now),
            Ok(version) => {
                if let Some(other) = taken {
                    self.displaced.insert(name.into(), version.at.clone());
                    let reason = format!("the app `{other}` is at `{}` already", version.place_name());
                    app.reject(Some(version.id), reason)
                } else {
                    let lazy = version.settings.lazy.unwrap_or(self.builder.lazy);
                    app.offer(Arc::new(version), serial, lazy, now)
                }
            }
        };
        self.act(name, acts);
    }

    /// The app that is where another one wants to be.
    fn taken(&self, name: &str, at: &At) -> Option<String> {
        let mut others = self.apps.iter().filter(|(other, _)| *other != name);
        let (other, _) = others.find(|(_, app)| app.is_at(at))?;
        Some(other.clone())
    }

    fn act(&mut self, name: &str, acts: Vec<Act>) {
        // most of what happens changes nothing
        self.is_stale |= !acts.is_empty();
        for act in acts {
            match act {
                Act::Start(serial, version) => {
                    if let Err(error) = self.start(name, serial, &version) {
                        let reason = format!("it could not be started: {error}");
                        // as if it had ended at once, when all that is to be done now is done
                        let _ = self.news.send(News::Ended(serial, Some(reason)));
                    }
                }
                Act::Route(serial, standing) => self.route(name, serial, standing),
                Act::Unroute => {
                    self.changes += 1;
                    self.router.send(ROUTER, Kind::Unroute, self.changes, name.as_bytes());
                }
                Act::Stop(serial) => {
                    if let Some(run) = self.runs.get(&serial) {
                        let _ = run.orders.send(Order::Stop(Stop::Politely));
                    }
                }
                Act::Kill(serial) => {
                    if let Some(run) = self.runs.remove(&serial) {
                        run.task.abort();
                    }
                }
                Act::Tell(event) => self.tell(event),
            }
        }
        if self.apps.get(name).is_some_and(|app| app.is_over() && !app.is_there()) {
            self.apps.remove(name);
        }
    }

    /// Starts the workers of a version.
    fn start(&mut self, name: &str, serial: u64, version: &Arc<Version>) -> io::Result<()> {
        let (channel, theirs) = channel::new()?;
        let (orders, ordered) = mpsc::unbounded_channel();
        let (told, ended) = (self.news.clone(), self.news.clone());
        let (pool, compiling) = (version.pool.clone(), self.compiling.clone());
        let workers = pool.current_workers();
        let started = version.clone();
        let task = tokio::task::spawn_local(async move {
            // whoever hears it may have gone
            let sink = Box::new(move |event| _ = told.send(News::Event(serial, event)));
            let result = pool.serve_channel(theirs, ordered, sink, &compiling).await;
            let _ = ended.send(News::Ended(serial, result.err().map(|error| started.why(&error))));
        });
        let run = Running {
            app: name.into(),
            version: version.id.clone(),
            workers,
            online: vec![],
            channel,
            orders,
            task: task.abort_handle(),
            since_ms: None,
        };
        self.runs.insert(serial, run);
        Ok(())
    }

    /// Tells the router where requests of an app go.
    fn route(&mut self, name: &str, serial: Option<u64>, standing: Standing) {
        // one that never was anywhere is nowhere
        let Some(Place { at, timeout, keep }) = self.apps.get(name).and_then(|app| app.place.clone()) else { return };
        self.changes += 1;
        let version = serial.and_then(|serial| self.runs.get(&serial)).map(|run| run.version.clone());
        let route = Route { number: self.changes, app: name.into(), version, at, timeout, keep, standing };
        let route = to_vec(&route).expect("plain data has a JSON form");
        let Some((serial, run)) = serial.and_then(|serial| Some((serial, self.runs.get_mut(&serial)?))) else {
            return self.router.send(ROUTER, Kind::Route, 0, &route);
        };
        run.since_ms.get_or_insert_with(|| millis(SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()));
        match run.channel.try_clone() {
            Ok(channel) => self.router.send_with(ROUTER, Kind::Route, serial, &route, channel),
            Err(error) => {
                // nobody would come to it
                if let Some(run) = self.runs.remove(&serial) {
                    run.task.abort();
                }
                let (reason, other) = (format!("the router could not be told of it: {error}"), self.next_serial());
                let app = self.apps.get_mut(name);
                let acts = app.map(|app| app.ended(serial, Some(reason), other, Instant::now())).unwrap_or_default();
                self.act(name, acts);
            }
        }
    }

    /// Sends the router all that it must know: it is a new one.
    fn introduce(&mut self) {
        let apps = self.apps.iter();
        let all = apps.map(|(name, app)| (name.clone(), app.live.as_ref().map(|run| run.serial), app.standing()));
        for (name, serial, standing) in all.collect::<Vec<_>>() {
            self.route(&name, serial, standing);
        }
        self.send_listing();
    }

    /// Tells the router what there is to list, when that has changed.
    fn list(&mut self) {
        if !std::mem::take(&mut self.is_stale) {
            return;
        }
        let entry = |(name, app): (&String, &App)| {
            let version = app.version();
            let run = app.live.as_ref().and_then(|run| self.runs.get(&run.serial));
            Entry {
                name: name.clone(),
                at: version.map_or_else(|| format!("/{name}"), |version| version.place_name()),
                state: app.state().into(),
                version: run.map(|run| run.version.clone()),
                workers: run.map_or(0, |run| run.workers),
                since_ms: run.and_then(|run| run.since_ms),
                error: app.error.clone(),
            }
        };
        let there = self.apps.iter().filter(|(_, app)| app.is_there());
        let listing = Listing { apps: there.map(entry).collect() };
        if listing != self.listing {
            self.listing = listing;
            self.send_listing();
        }
        for (after, _) in &mut self.untold {
            after.get_or_insert(self.changes);
        }
        self.tell_what_holds();
    }

    fn send_listing(&mut self) {
        let listing = to_vec(&self.listing).expect("plain data has a JSON form");
        self.changes += 1;
        self.router.send(ROUTER, Kind::Index, self.changes, &listing);
    }

    fn hear(&mut self, news: News) {
        let now = Instant::now();
        match news {
            News::Router(event) => self.tell(Event::Router { part: "router", event }),
            News::Event(serial, event) => {
                let Some(run) = self.runs.get_mut(&serial) else { return };
                let (name, workers) = (run.app.clone(), run.workers as usize);
                let mut acts = vec![];
                match &event {
                    event::Event::Online { worker, .. } if !run.online.contains(worker) => {
                        run.online.push(*worker);
                        if run.online.len() == workers {
                            acts = self.apps.get_mut(&name).map(|app| app.ready(serial, now)).unwrap_or_default();
                        }
                    }
                    event::Event::Exit { outcome, .. } if !outcome.voluntary => {
                        let reason = format!("a worker {outcome}");
                        let other = self.next_serial();
                        let app = self.apps.get_mut(&name);
                        acts = app.map(|app| app.crashed(serial, &reason, other, now)).unwrap_or_default();
                    }
                    _ => {}
                }
                let version = self.runs.get(&serial).map(|run| run.version.clone()).unwrap_or_default();
                self.tell(Event::Worker { app: name.clone(), version, event });
                self.act(&name, acts);
            }
            News::Ended(serial, reason) => {
                let Some(run) = self.runs.remove(&serial) else { return };
                let other = self.next_serial();
                let app = self.apps.get_mut(&run.app);
                let acts = app.map(|app| app.ended(serial, reason, other, now)).unwrap_or_default();
                self.act(&run.app, acts);
            }
        }
    }

    fn poll_router(&mut self, cx: &mut std::task::Context<'_>) -> Poll<Step> {
        let mut told = vec![];
        let step = self.router.poll(cx, |_, frame| told_by(frame).map(|news| told.push(news)));
        for news in told {
            self.hear_router(news);
        }
        step
    }

    fn hear_router(&mut self, told: Told) {
        match told {
            Told::Access(record, dropped) => {
                if dropped > 0 {
                    let message = format!("{dropped} lines of the access log were dropped: nobody took them");
                    self.tell(Event::Error { message });
                }
                self.tell(Event::Access { record });
            }
            Told::Routed(number) => self.note_changed(number),
            Told::Idle(serial) => {
                let Some(name) = self.runs.get(&serial).map(|run| run.app.clone()) else { return };
                let acts = self.apps.get_mut(&name).map(|app| app.idle(serial)).unwrap_or_default();
                self.act(&name, acts);
            }
            Told::Wake(name) => {
                let serial = self.next_serial();
                let app = self.apps.get_mut(&name);
                let acts = app.map(|app| app.wake(serial, Instant::now())).unwrap_or_default();
                self.act(&name, acts);
            }
        }
    }

    /// With a router all that it had in flight is gone.
    fn forget_in_flight(&mut self) {
        // the next one begins with all changes
        self.note_changed(self.changes);
        let names: Vec<_> = self.apps.keys().cloned().collect();
        for name in names {
            let acts = self.apps.get_mut(&name).map(App::all_idle).unwrap_or_default();
            self.act(&name, acts);
        }
    }

    fn tick(&mut self) {
        let now = Instant::now();
        let due = self.apps.iter().filter(|(_, app)| app.next_due().is_some_and(|due| due <= now));
        let names: Vec<_> = due.map(|(name, _)| name.clone()).collect();
        for name in names {
            let acts = self.apps.get_mut(&name).map(|app| app.tick(now)).unwrap_or_default();
            self.act(&name, acts);
        }
    }

    fn next_due(&self) -> Option<Instant> {
        self.apps.values().filter_map(App::next_due).chain(self.settle.next()).min()
    }

    /// Lets all workers finish, now that nobody sends them any more. Whether some had to be killed.
    async fn end_all(&mut self, came: &mut mpsc::UnboundedReceiver<News>) -> bool {
        for (_, event) in std::mem::take(&mut self.untold) {
            (self.tell)(event);
        }
        for run in self.runs.values() {
            let _ = run.orders.send(Order::Stop(Stop::Politely));
        }
        // one that is being compiled hears no order
        let until = Instant::now() + self.builder.grace;
        self.runs.retain(|_, run| {
            let is_compiling = run.online.is_empty();
            if is_compiling {
                run.task.abort();
            }
            !is_compiling
        });
        while !self.runs.is_empty() {
            match tokio::time::timeout_at(until.into(), came.recv()).await {
                Ok(Some(News::Ended(serial, _))) => _ = self.runs.remove(&serial),
                Ok(Some(News::Event(serial, event))) => {
                    if let Some(Running { app, version, .. }) = self.runs.get(&serial) {
                        (self.tell)(Event::Worker { app: app.clone(), version: version.clone(), event });
                    }
                }
                Ok(Some(News::Router(event))) => (self.tell)(Event::Router { part: "router", event }),
                Ok(None) | Err(_) => return true,
            }
        }
        false
    }
}
