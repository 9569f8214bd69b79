"""Every exception raised on purpose.

A message states the fact, the limit and the remedy, and names no patient, path, UID or
header value: an exception's text may be sent to the server.
"""


class AgssdError(Exception):
    """Base of all errors meant for a user; a command turns it into one line and exit code 2."""


class ConfigError(AgssdError):
    """A configuration is wrong; ``problems`` lists every fault found, one line each."""

    def __init__(self, message: str, problems: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.problems = problems or (message,)


class DataError(AgssdError):
    """A scan cannot be used."""


class SeriesError(DataError):
    """A DICOM series is incomplete, mixed or uneven."""


class OtherStorageError(SeriesError):
    """A DICOM file is no CT or MR; its storage class and modality are no part of the message."""

    def __init__(self, message: str, *, storage: str, modality: str) -> None:
        super().__init__(message)
        self.storage, self.modality = storage, modality


class VolumeError(DataError):
    """A volume's array or geometry cannot be used."""


class ClipError(DataError):
    """An ultrasound image or clip cannot be used."""


class CatalogueError(DataError):
    """A site's folder or catalogue is missing, empty or damaged."""


class CacheError(DataError):
    """A prepared volume is missing, stale or damaged."""


class ShapeError(AgssdError):
    """Arrays that belong together have different shapes."""


class WeightsError(AgssdError):
    """Named arrays do not fit the expected schema, or a file of them is damaged."""


class CheckpointError(AgssdError):
    """A checkpoint is missing, damaged or of another run."""


class TrainingError(AgssdError):
    """A step cannot be taken; the weights were left as they were."""


class CollapseError(TrainingError):
    """The teacher's targets have collapsed and the plan says to stop then."""


class ProtocolError(AgssdError):
    """A message does not follow the protocol."""


class ProtocolVersionError(ProtocolError):
    """The other side speaks another version of the protocol; the text says which to upgrade."""


class OversizeError(ProtocolError):
    """A message holds or declares more bytes than its cap."""


class KeyFileError(AgssdError):
    """A key or certificate is missing, damaged, readable by others or of another kind."""


class SignatureError(AgssdError):
    """Signed bytes were altered, or signed by another key or for another purpose."""


class EnrolmentError(AgssdError):
    """A kit, a request or an answer of enrolment cannot be taken."""


class JournalError(AgssdError):
    """A journal was tampered with, is damaged, or cannot be written."""


class PayloadError(AgssdError):
    """Arrays that came are not those that were declared; ``reason`` is ``size`` or ``digest``."""

    def __init__(self, message: str, *, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class UpdateRejectedError(AgssdError):
    """A site's update was refused.

    Attributes:
        site: enrolled name of the site.
        reason: class of the reason, one of ``server.admission.REASONS``.
    """

    def __init__(self, message: str, *, site: str, reason: str) -> None:
        super().__init__(message)
        self.site = site
        self.reason = reason


class OrderRefusedError(AgssdError):
    """A site declines an order; ``reason`` is the class that the server is told."""

    def __init__(self, message: str, *, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class RoundError(AgssdError):
    """A round could not be completed."""


class EngineError(AgssdError):
    """The federation engine could not be started or has ended unexpectedly."""


class AccountingError(AgssdError):
    """Noise, sampling rate, steps or delta are such that no epsilon can be stated."""


class BudgetError(AgssdError):
    """What is planned would spend more privacy than a budget allows; nothing was spent."""


class LedgerError(AgssdError):
    """A privacy ledger is missing, cut, edited, rolled back or cannot be written."""
