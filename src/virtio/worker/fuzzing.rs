//! Devices without threads, for the fuzz targets: each input does the same each time, and thousands are tried in a second.

use super::*;

impl Paused {
    /// A device, not yet started, that does nothing but when it is [polled](Self::poll).
    pub fn start(
        name: &str,
        (device, rings): Parts,
        features: u64,
        ram: &GuestRam,
        kicks: &[Arc<EventFd>],
        interrupt: &Arc<InterruptState>,
    ) -> Result<Self, (io::Error, Parts)> {
        let (events, wake) = match events(kicks, &rings) {
            Ok(events) => events,
            Err(error) => return Err((error, (device, rings))),
        };
        let io = io(rings, ram, kicks, interrupt, events);
        let sandbox = sandbox::Sandbox::default().device(0, std::iter::empty());
        Ok(Self(Loop::new(name, device, io, features, wake, sandbox)))
    }

    /// Has the device do what there is to do at the moment; whether there was anything.
    pub fn poll(&mut self) -> bool {
        let device = &mut *self.0;
        let done = match device.state {
            State::New => device.begin().map(|()| true),
            State::Started => device.turn(Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).map(|turn| turn.events > 0),
            State::Failed => Ok(false),
        };
        done.unwrap_or_else(|error| {
            device.fail(&error);
            true
        })
    }

    /// The device's queues.
    pub fn queues(&self) -> &[Option<Queue>] {
        &self.0.io.queues
    }
}
