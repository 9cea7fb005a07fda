//! What a worker has of another site: it offers units, and gets each back with what is needed of it.

use std::sync::atomic::Ordering;

use crossbeam_channel::{Receiver, Sender, select};
use reseal_proto::wire::{DataMessage, MAX_CLUSTERS};

use super::connection::Connection;
use crate::BackupError;
use crate::judge::ClusterHash;
use crate::plan::Unit;
use crate::worker::Buffer;

/// Answers that wait for a worker before he looks to those instead of offering more. Fewer, and a long line would run dry between
/// an answer and the next; more, and what was hashed would be out of the caches when it is compressed.
const STOCK: usize = 4;

/// A unit that was offered.
pub(crate) struct Offered {
    pub unit: Unit,
    /// Bytes of it that were read.
    pub read: u64,
    pub buffer: Buffer,
    /// Which of its clusters are no holes, the first in the lowest bit.
    there: u16,
}

/// The same with the answer.
pub(crate) struct Answered {
    pub offered: Offered,
    /// Which of its clusters are needed, the first in the lowest bit. `None` if no answer comes any more.
    pub needed: Option<u16>,
}

/// What is to be done next.
pub(crate) enum Next<T> {
    Unit(T),
    Answered(Answered),
}

/// A worker's way to ask.
pub(crate) struct Asker<'a> {
    connection: &'a Connection,
    answered: Receiver<Answered>,
    /// Gone when nothing more is offered: the last answer to what was offered ends the channel.
    back: Option<Sender<Answered>>,
}

impl<'a> Asker<'a> {
    /// Those of so many workers, of which each may go on with what another has offered.
    pub(super) fn of(connection: &'a Connection, workers: usize) -> Vec<Asker<'a>> {
        let (back, answered) = crossbeam_channel::unbounded();
        let asker = |_| Asker { connection, answered: answered.clone(), back: Some(back.clone()) };
        (0..workers).map(asker).collect()
    }

    /// A unit to offer, or one that was answered. `None` when there is neither, and never will be.
    pub(crate) fn next<T>(&mut self, units: &Receiver<T>) -> Option<Next<T>> {
        if self.answered.len() < STOCK
            && let Ok(unit) = units.try_recv()
        {
            return Some(Next::Unit(unit));
        }
        if self.back.is_some() {
            select! {
                recv(self.answered) -> answered => return answered.ok().map(Next::Answered),
                recv(units) -> unit => match unit {
                    Ok(unit) => return Some(Next::Unit(unit)),
                    Err(_) => self.back = None,
                },
            }
        }
        self.answered.recv().ok().map(Next::Answered)
    }

    /// A buffer for a unit.
    pub(crate) fn buffer(&self) -> Buffer {
        self.connection.buffers.lock().pop().unwrap_or_default()
    }

    /// Gives one back.
    pub(crate) fn give_back(&self, buffer: Buffer) {
        self.connection.buffers.lock().push(buffer);
    }

    /// Offers a unit, of which so many bytes were read. The buffer holds its clusters that are no holes, each at its place.
    pub(crate) fn offer(
        &self,
        unit: Unit,
        read: u64,
        buffer: Buffer,
        hashes: &[ClusterHash],
    ) -> Result<(), BackupError> {
        let there = hashes.iter().enumerate().map(|(nth, hash)| u16::from(hash.is_some()) << nth);
        let offered = Offered { unit, read, buffer, there: there.fold(0, |bits, bit| bits | bit) };
        self.connection.offer(offered, hashes, self.back.as_ref().ok_or(BackupError::Thread)?)
    }

    /// Sends what is needed of a unit. `encode` appends the frames of its nth cluster.
    pub(crate) fn send(
        &self,
        offered: &Offered,
        needed: Option<u16>,
        mut encode: impl FnMut(usize, &mut Vec<u8>),
    ) -> Result<(), BackupError> {
        let needed = needed.ok_or_else(|| self.connection.error())?;
        if needed & !offered.there != 0 {
            return Err(self.connection.broken("it needs clusters that were not offered"));
        }
        if needed == 0 {
            return Ok(());
        }
        let mut message = DataMessage::new(offered.unit.sequence, self.connection.outbox.buffer());
        let mut bytes = 0;
        for nth in (0..MAX_CLUSTERS).filter(|nth| needed >> nth & 1 == 1) {
            bytes += message.cluster(|out| encode(nth, out)) as u64;
        }
        self.connection.clusters.fetch_add(needed.count_ones().into(), Ordering::Relaxed);
        self.connection.bytes.fetch_add(bytes, Ordering::Relaxed);
        self.connection.send_encoded(message.finish())
    }
}

#[cfg(test)]
mod tests {
    use crossbeam_channel::bounded;
    use reseal_format::geometry::CLUSTER;
    use reseal_proto::wire::{Data, FromSource, FromTarget, Need};
    use tokio::io::duplex;
    use tokio::runtime::Builder;

    use super::*;
    use crate::link::carry;
    use crate::plan::Task;

    #[test]
    fn units_are_offered_while_others_wait_and_each_comes_back_once() {
        let runtime = Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let (source, target) = duplex(1 << 20);
        let (inbox, outbox) = carry::<FromTarget, _>(runtime.handle(), source, None);
        let connection = Connection::new("the target".into(), inbox, outbox);
        let (mut offers, answers) = carry::<FromSource, _>(runtime.handle(), target, None);
        let mut askers = Asker::of(&connection, 2);
        let (plan, units) = bounded(3);
        let cluster = vec![1; CLUSTER];
        for sequence in 0..3 {
            plan.send(Unit { sequence, first: sequence, count: 1, task: Task::Read }).unwrap();
            let Some(Next::Unit(unit)) = askers[0].next(&units) else { panic!("nothing was answered yet") };
            let hashes = [Some(blake3::hash(&cluster))];
            askers[0].offer(unit, 7, Buffer::new(cluster.clone()), &hashes).unwrap();
            assert!(matches!(offers.next(), Ok(FromSource::Offer(offer)) if offer.sequence == sequence));
        }
        let mut answered = |sequence, clusters| {
            answers.blocking_send(FromTarget::Need(Need { sequence, clusters }).encode()).unwrap();
            let Some(Next::Answered(answered)) = askers[1].next(&units) else { panic!("no unit is left") };
            assert_eq!((answered.offered.unit.sequence, answered.offered.read), (sequence, 7));
            askers[1].send(&answered.offered, answered.needed, |nth, out| {
                assert_eq!((nth, &answered.offered.buffer[..]), (0, &cluster[..]));
                out.push(9);
            })
        };
        answered(1, 1).unwrap();
        let data = FromSource::Data(Data { sequence: 1, frames: vec![vec![9]] });
        assert!(matches!(offers.next(), Ok(came) if came == data));
        assert!(answered(0, 2).is_err(), "there was no second cluster");
        drop((answers, offers));
        let Some(Next::Answered(last)) = askers[1].next(&units) else { panic!("the third was not given back") };
        assert_eq!((last.offered.unit.sequence, last.needed), (2, None));
        assert!(askers[1].send(&last.offered, last.needed, |_, _| panic!("nothing is needed")).is_err());
        drop(plan);
        // Each knows it only when the others have seen the end of the plan, too.
        std::thread::scope(|scope| {
            for asker in &mut askers {
                scope.spawn(|| assert!(asker.next(&units).is_none()));
            }
        });
    }
}
