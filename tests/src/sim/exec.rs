//! Simulated time and processes: a single-threaded executor in which every wait is an event.
//!
//! Agents, guards and proxies are written as ordinary `async` code, because that is what the real ones
//! are; between any two of their waits a process can be killed (its futures are dropped), frozen (they
//! are not polled, as after SIGSTOP) and thawed. Nothing here reads a clock or starts a thread, and
//! all choices come from the caller, so a run is a function of its seed.

use std::cell::{Cell, RefCell};
use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::future::Future;
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use futures_util::future::{Either, select};
use kornak_cluster::Moment;

/// Number of a task; never used twice.
pub type TaskId = u64;

/// Number of a process; never used twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct ProcessId(usize);

type Woken = Arc<Mutex<Vec<TaskId>>>;
type Work = Pin<Box<dyn Future<Output = ()>>>;

/// The executor of one world.
pub struct Exec {
    now: Cell<u64>,
    order: Cell<u64>,
    next_task: Cell<TaskId>,
    due: RefCell<BinaryHeap<Reverse<Due>>>,
    tasks: RefCell<BTreeMap<TaskId, Task>>,
    processes: RefCell<Vec<Process>>,
    woken: Woken,
}

struct Due {
    at: u64,
    order: u64,
    what: What,
}

enum What {
    Wake(Waker),
    Call(Box<dyn FnOnce()>),
}

struct Task {
    process: ProcessId,
    /// `None` while it is being polled.
    work: Option<Work>,
    waker: Waker,
}

#[derive(Default)]
struct Process {
    dead: bool,
    frozen: bool,
    /// Tasks that were woken while it was frozen.
    deferred: Vec<TaskId>,
}

struct TaskWaker {
    task: TaskId,
    woken: Woken,
}

impl Wake for TaskWaker {
    fn wake(self: Arc<Self>) {
        self.woken.lock().unwrap_or_else(PoisonError::into_inner).push(self.task);
    }
}

impl PartialEq for Due {
    fn eq(&self, other: &Self) -> bool {
        self.order == other.order
    }
}

impl Eq for Due {}

impl PartialOrd for Due {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Due {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.at, self.order).cmp(&(other.at, other.order))
    }
}

impl Exec {
    /// An executor at time zero.
    pub fn new() -> Rc<Self> {
        Rc::new(Self {
            now: Cell::new(0),
            order: Cell::new(0),
            next_task: Cell::new(0),
            due: RefCell::default(),
            tasks: RefCell::default(),
            processes: RefCell::default(),
            woken: Arc::default(),
        })
    }

    /// True time, which no simulated clock shows.
    pub fn now(&self) -> Moment {
        Moment::new(Duration::from_micros(self.now.get()))
    }

    /// Calls `what` after `delay`, whatever is dead or frozen by then.
    pub fn after(&self, delay: Duration, what: impl FnOnce() + 'static) {
        self.push(delay, What::Call(Box::new(what)));
    }

    /// Wakes a task at a moment.
    pub fn wake_at(&self, moment: Moment, waker: Waker) {
        self.push(moment.since(self.now()), What::Wake(waker));
    }

    fn push(&self, delay: Duration, what: What) {
        let order = self.order.get() + 1;
        self.order.set(order);
        // Rounded up: who is woken before the moment that it waits for is not woken again.
        let delay = delay.as_nanos().div_ceil(1000);
        let at = self.now.get() + u64::try_from(delay).unwrap_or(u64::MAX / 2);
        self.due.borrow_mut().push(Reverse(Due { at, order, what }));
    }

    /// A new process.
    pub fn process(&self) -> ProcessId {
        let mut processes = self.processes.borrow_mut();
        processes.push(Process::default());
        ProcessId(processes.len() - 1)
    }

    /// Starts a task in a process; a dead process starts nothing.
    pub fn spawn(&self, process: ProcessId, work: impl Future<Output = ()> + 'static) -> TaskId {
        let task = self.next_task.get() + 1;
        self.next_task.set(task);
        if self.is_dead(process) {
            return task;
        }
        let waker = Waker::from(Arc::new(TaskWaker { task, woken: Arc::clone(&self.woken) }));
        waker.wake_by_ref();
        let work: Work = Box::pin(work);
        self.tasks.borrow_mut().insert(task, Task { process, work: Some(work), waker });
        task
    }

    /// Drops a task where it stands.
    pub fn abort(&self, task: TaskId) {
        let dropped = self.tasks.borrow_mut().remove(&task);
        drop(dropped);
    }

    /// Whether a task has not ended.
    pub fn runs(&self, task: TaskId) -> bool {
        self.tasks.borrow().contains_key(&task)
    }

    /// Ends a process where it stands.
    pub fn kill(&self, process: ProcessId) {
        if let Some(process) = self.processes.borrow_mut().get_mut(process.0) {
            process.dead = true;
        }
        let gone: Vec<Task> = self
            .tasks
            .borrow_mut()
            .extract_if(.., |_, task| task.process == process)
            .map(|(_, task)| task)
            .collect();
        drop(gone);
    }

    /// Whether a process was killed.
    pub fn is_dead(&self, process: ProcessId) -> bool {
        self.processes.borrow().get(process.0).is_none_or(|process| process.dead)
    }

    /// Stops polling a process.
    pub fn freeze(&self, process: ProcessId) {
        if let Some(process) = self.processes.borrow_mut().get_mut(process.0) {
            process.frozen = true;
        }
    }

    /// Whether a process is frozen.
    pub fn is_frozen(&self, process: ProcessId) -> bool {
        self.processes.borrow().get(process.0).is_some_and(|process| process.frozen)
    }

    /// Polls a process again, beginning after `delay`.
    pub fn thaw(self: &Rc<Self>, process: ProcessId, delay: Duration) {
        let exec = Rc::clone(self);
        self.after(delay, move || {
            let deferred = match exec.processes.borrow_mut().get_mut(process.0) {
                Some(process) => {
                    process.frozen = false;
                    std::mem::take(&mut process.deferred)
                }
                None => return,
            };
            exec.woken.lock().unwrap_or_else(PoisonError::into_inner).extend(deferred);
        });
    }

    /// Waits for `delay`.
    pub fn sleep(self: &Rc<Self>, delay: Duration) -> Sleep {
        let until = self.now.get() + u64::try_from(delay.as_micros()).unwrap_or(u64::MAX / 2);
        Sleep { exec: Rc::clone(self), until, armed: false }
    }

    /// `None` if `work` has not ended after `limit`.
    pub async fn within<T>(
        self: &Rc<Self>,
        limit: Duration,
        work: impl Future<Output = T>,
    ) -> Option<T> {
        match select(pin!(work), self.sleep(limit)).await {
            Either::Left((value, _)) => Some(value),
            Either::Right(_) => None,
        }
    }

    /// Runs until `end`, calling `after_each` whenever something has happened; it ends the run by
    /// answering false.
    pub fn run(&self, end: Moment, mut after_each: impl FnMut() -> bool) {
        loop {
            loop {
                let mut woken =
                    std::mem::take(&mut *self.woken.lock().unwrap_or_else(PoisonError::into_inner));
                if woken.is_empty() {
                    break;
                }
                // In which order tokio wakes those who wait for one thing is chance.
                woken.sort_unstable();
                woken.dedup();
                for task in woken {
                    self.poll(task);
                    if !after_each() {
                        return;
                    }
                }
            }
            let next = self.due.borrow_mut().pop();
            let Some(Reverse(next)) = next else { return };
            if Moment::new(Duration::from_micros(next.at)) > end {
                return;
            }
            self.now.set(next.at);
            match next.what {
                What::Wake(waker) => waker.wake(),
                What::Call(call) => {
                    call();
                    if !after_each() {
                        return;
                    }
                }
            }
        }
    }

    fn poll(&self, id: TaskId) {
        let (mut work, waker) = {
            let mut tasks = self.tasks.borrow_mut();
            let Some(task) = tasks.get_mut(&id) else { return };
            if let Some(process) = self.processes.borrow_mut().get_mut(task.process.0)
                && process.frozen
            {
                process.deferred.push(id);
                return;
            }
            let Some(work) = task.work.take() else { return };
            (work, task.waker.clone())
        };
        let done = work.as_mut().poll(&mut Context::from_waker(&waker)).is_ready();
        // What is dropped here may itself end tasks, so nothing is borrowed meanwhile.
        let mut work = Some(work);
        let gone = {
            let mut tasks = self.tasks.borrow_mut();
            if done {
                tasks.remove(&id)
            } else {
                if let Some(task) = tasks.get_mut(&id) {
                    task.work = work.take();
                }
                None
            }
        };
        drop((gone, work));
    }

    /// Drops everything that waits, so that a world can be freed.
    pub fn clear(&self) {
        let due = std::mem::take(&mut *self.due.borrow_mut());
        drop(due);
        let tasks = std::mem::take(&mut *self.tasks.borrow_mut());
        drop(tasks);
    }
}

/// See [`Exec::sleep`].
pub struct Sleep {
    exec: Rc<Exec>,
    until: u64,
    armed: bool,
}

impl Future for Sleep {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        if self.exec.now.get() >= self.until {
            return Poll::Ready(());
        }
        if !self.armed {
            self.armed = true;
            let delay = Duration::from_micros(self.until - self.exec.now.get());
            self.exec.push(delay, What::Wake(context.waker().clone()));
        }
        Poll::Pending
    }
}

/// The sending half of [`slot`]; dropped unused it says that no answer will come.
pub struct Reply<T>(Rc<RefCell<Slot<T>>>);

/// The receiving half of [`slot`]: `None` if the other half was dropped.
pub struct Answer<T>(Rc<RefCell<Slot<T>>>);

struct Slot<T> {
    value: Option<T>,
    closed: bool,
    waker: Option<Waker>,
}

/// One answer to one question.
pub fn slot<T>() -> (Reply<T>, Answer<T>) {
    let slot = Rc::new(RefCell::new(Slot { value: None, closed: false, waker: None }));
    (Reply(Rc::clone(&slot)), Answer(slot))
}

impl<T> Reply<T> {
    /// Gives the answer.
    pub fn give(self, value: T) {
        self.0.borrow_mut().value = Some(value);
    }
}

impl<T> Drop for Reply<T> {
    fn drop(&mut self) {
        let mut slot = self.0.borrow_mut();
        slot.closed = true;
        if let Some(waker) = slot.waker.take() {
            waker.wake();
        }
    }
}

impl<T> Future for Answer<T> {
    type Output = Option<T>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<T>> {
        let mut slot = self.0.borrow_mut();
        if let Some(value) = slot.value.take() {
            return Poll::Ready(Some(value));
        }
        if slot.closed {
            return Poll::Ready(None);
        }
        slot.waker = Some(context.waker().clone());
        Poll::Pending
    }
}

/// Wakes whoever waits for a change; a change nobody waited for is remembered once.
#[derive(Clone, Default)]
pub struct Notify(Rc<RefCell<NotifyState>>);

#[derive(Default)]
struct NotifyState {
    version: u64,
    wakers: Vec<Waker>,
}

impl Notify {
    /// Something has changed.
    pub fn notify(&self) {
        let mut state = self.0.borrow_mut();
        state.version += 1;
        for waker in state.wakers.drain(..) {
            waker.wake();
        }
    }

    /// Everything seen up to now.
    pub fn version(&self) -> u64 {
        self.0.borrow().version
    }

    /// Waits for a change after `seen`.
    pub fn changed_since(&self, seen: u64) -> Changed {
        Changed { notify: self.clone(), seen }
    }
}

/// See [`Notify::changed_since`].
pub struct Changed {
    notify: Notify,
    seen: u64,
}

impl Future for Changed {
    type Output = ();

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        let mut state = self.notify.0.borrow_mut();
        if state.version != self.seen {
            return Poll::Ready(());
        }
        state.wakers.push(context.waker().clone());
        Poll::Pending
    }
}
