"""What the engine refuses, and why."""

from adapters.errors import TrunklineError


class BadInput(TrunklineError):
    code = "validation_error"


class SequenceTooLong(BadInput):
    code = "sequence_too_long"


class TokenOutOfRange(BadInput):
    code = "token_out_of_range"


class EmptyInput(BadInput):
    code = "empty_input"


class UntokenizableText(BadInput):
    code = "untokenizable_text"


class TooManyInputs(TrunklineError):
    code = "too_many_inputs"


class TooManyTokens(TrunklineError):
    code = "too_many_tokens"


class CriticNotAvailable(TrunklineError):
    code = "critic_not_available"


class ClassifierNotAvailable(TrunklineError):
    code = "classifier_not_available"


class NonFiniteResult(TrunklineError):
    code = "non_finite_result"


class DeadlineExceeded(TrunklineError):
    code = "deadline_exceeded"


class Overloaded(TrunklineError):
    """`details["retry_after_s"]` is when to try again."""

    code = "overloaded"


class Draining(TrunklineError):
    code = "draining"


class NotReady(TrunklineError):
    code = "not_ready"
