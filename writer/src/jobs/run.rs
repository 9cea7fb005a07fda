//! Runs jobs: as many at once as the file allows, each again where something was unreachable.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use reseal_cli::{Failure, Status};
use reseal_format::names::VmName;

use super::attempt::{Attempted, Launch, Made};
use super::lock::Lock;
use super::{Job, JobFile};
use crate::status::{Attempt, Results};

/// Longest pause between two attempts.
const LONGEST_PAUSE: Duration = Duration::from_secs(600);
/// How often a pause looks whether it is to end.
const LOOK: Duration = Duration::from_millis(50);

/// What came of a job.
#[derive(Debug)]
pub enum Outcome {
    Done(Made),
    Failed(Failure),
    /// Nothing was tried.
    Skipped(Failure),
}

impl Outcome {
    fn failure(&self) -> Option<&Failure> {
        match self {
            Outcome::Done(_) => None,
            Outcome::Failed(failure) | Outcome::Skipped(failure) => Some(failure),
        }
    }

    /// One word.
    pub fn word(&self) -> &'static str {
        match self {
            Outcome::Done(_) => "done",
            Outcome::Failed(_) => "failed",
            Outcome::Skipped(_) => "skipped",
        }
    }
}

/// A job that has ended.
#[derive(Debug)]
pub struct Ended {
    pub outcome: Outcome,
    /// What is wrong with the command after it.
    pub after: Option<Failure>,
    pub attempts: u32,
    pub took: Duration,
}

impl Ended {
    /// What counts of it: the backup, then the command after it.
    pub fn failure(&self) -> Option<&Failure> {
        self.outcome.failure().or(self.after.as_ref())
    }
}

/// What happens, as it does.
#[derive(Debug)]
pub enum Event<'a> {
    Begun,
    /// The backup warns of something.
    Warned(&'a str),
    /// Something was unreachable: after a pause it is tried again.
    Again {
        failure: &'a Failure,
        pause: Duration,
    },
    Ended(&'a Ended),
}

/// All jobs together.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Summary {
    pub done: usize,
    pub failed: usize,
    pub skipped: usize,
    /// The worst that happened.
    pub worst: Option<Status>,
}

/// Jobs to be run.
pub struct Run<'a> {
    /// The file, for its lock and for what is remembered.
    pub path: PathBuf,
    pub file: JobFile,
    /// The objectives of all jobs of the file, also of those that are not run now.
    pub objectives: Vec<(VmName, Option<u64>)>,
    pub launch: Launch,
    pub state: &'a Path,
    /// Where results are kept, if the vault is there to say whose they are.
    pub results: Option<Results>,
    /// Set when this program is to end: no job begins any more, and those that run are told to end.
    pub stop: &'a AtomicBool,
    /// Told what happens, by any thread.
    pub tell: &'a (dyn Fn(&Job, Event<'_>) + Sync),
}

impl Run<'_> {
    /// Runs all; an error if another process does.
    pub fn run(&self) -> Result<Summary, Failure> {
        let _lock = Lock::take(self.state, &self.path)?;
        if let Some(results) = &self.results {
            // What can't be noted is only not shown.
            let _ = results.promise(&self.path, &self.objectives);
        }
        let (next, summary) = (AtomicUsize::new(0), Mutex::new(Summary::default()));
        let work = || {
            while let Some(job) = self.file.jobs.get(next.fetch_add(1, Ordering::Relaxed)) {
                let ended = self.job(job);
                summary.lock().add(&ended);
                (self.tell)(job, Event::Ended(&ended));
            }
        };
        thread::scope(|scope| {
            for _ in 0..self.file.parallel.min(self.file.jobs.len()) {
                scope.spawn(work);
            }
        });
        Ok(summary.into_inner())
    }

    fn job(&self, job: &Job) -> Ended {
        let began = Instant::now();
        let ended = |outcome, after, attempts| Ended { outcome, after, attempts, took: began.elapsed() };
        let stopped = || Failure::new(Status::Failed, "it was not begun, for this program is to end");
        if self.stop.load(Ordering::Relaxed) {
            return ended(Outcome::Skipped(stopped()), None, 0);
        }
        (self.tell)(job, Event::Begun);
        let mut variables = vec![("RESEAL_JOB", job.name.clone()), ("RESEAL_VM", job.vm.as_str().to_owned())];
        let before = job.policy.before.as_ref();
        let before = before.map_or(Ok(()), |command| command.run(&variables, job.policy.command_timeout, self.stop));
        let (outcome, attempts) = match before {
            Ok(()) => self.attempts(job),
            Err(what) => {
                let failure = Failure::new(Status::Failed, format!("the command before it: {what}"));
                self.note(job, began, &failure);
                (Outcome::Skipped(failure), 0)
            }
        };
        variables.push(("RESEAL_RESULT", outcome.word().to_owned()));
        let status = outcome.failure().map_or(0, |failure| failure.status as u8);
        variables.push(("RESEAL_STATUS", status.to_string()));
        let point = match &outcome {
            Outcome::Done(made) => made.number().map(|number| format!("{}@{number}", job.vm)),
            _ => None,
        };
        variables.push(("RESEAL_POINT", point.unwrap_or_default()));
        // It cleans up after the one before, so it runs whatever happened, also when this program is to end.
        let never = AtomicBool::new(false);
        let after = job.policy.after.as_ref();
        let after = after.and_then(|command| command.run(&variables, job.policy.command_timeout, &never).err());
        let after = after.map(|what| Failure::new(Status::Failed, format!("the command after it: {what}")));
        ended(outcome, after, attempts)
    }

    /// Tries until it is done, or trying again would be for nothing.
    fn attempts(&self, job: &Job) -> (Outcome, u32) {
        let mut pause = job.policy.retry_pause;
        let mut attempts = 0;
        loop {
            attempts += 1;
            let began = Instant::now();
            let failure = match self.launch.attempt(job, self.stop, &|warning| (self.tell)(job, Event::Warned(warning)))
            {
                Attempted::Made(made) => return (Outcome::Done(made), attempts),
                Attempted::Failed(failure) => failure,
                Attempted::Died(failure) => {
                    self.note(job, began, &failure);
                    failure
                }
            };
            let may_pass = failure.status == Status::Unreachable && attempts <= job.policy.retries;
            if !may_pass || self.stop.load(Ordering::Relaxed) {
                return (Outcome::Failed(failure), attempts);
            }
            (self.tell)(job, Event::Again { failure: &failure, pause });
            if !self.wait(pause) {
                return (Outcome::Failed(failure), attempts);
            }
            pause = (pause * 2).min(LONGEST_PAUSE.max(job.policy.retry_pause));
        }
    }

    /// Waits; false if this program is to end.
    fn wait(&self, pause: Duration) -> bool {
        let began = Instant::now();
        while began.elapsed() < pause && !self.stop.load(Ordering::Relaxed) {
            thread::sleep(LOOK.min(pause));
        }
        !self.stop.load(Ordering::Relaxed)
    }

    /// Notes what no backup has noted itself.
    fn note(&self, job: &Job, began: Instant, failure: &Failure) {
        if let Some(results) = &self.results {
            // What can't be noted is only not shown.
            let _ = results.note(&job.vm, Attempt::failed(began, failure));
        }
    }
}

impl Summary {
    fn add(&mut self, ended: &Ended) {
        match ended.outcome {
            Outcome::Done(_) => self.done += 1,
            Outcome::Failed(_) => self.failed += 1,
            Outcome::Skipped(_) => self.skipped += 1,
        }
        let worse = ended.failure().map(|failure| failure.status);
        self.worst = self.worst.into_iter().chain(worse).max_by_key(|status| crate::status::severity(*status));
    }
}
