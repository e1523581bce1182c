package objstore

import "strings"

// Classify turns an S3 answer into an Error: by its code, else by its status.
func Classify(status int, code string) *Error {
	e := &Error{Status: status, Code: code}
	set := func(kind error, retry bool) *Error { e.Kind, e.Retryable = kind, retry; return e }
	switch code {
	case "NoSuchKey", "NotFound":
		return set(ErrNotFound, false)
	case "NoSuchBucket":
		return set(ErrBucketNotFound, false)
	case "PreconditionFailed":
		return set(ErrPrecondition, false)
	case "ConditionalRequestConflict", "OperationAborted":
		return set(ErrConflict, true)
	case "InvalidRange":
		return set(ErrRange, false)
	case "SlowDown", "SlowDownRead", "SlowDownWrite", "RequestLimitExceeded", "TooManyRequests", "ThrottlingException", "Throttling":
		return set(ErrThrottled, true)
	case "AccessDenied", "SignatureDoesNotMatch", "RequestTimeTooSkewed", "AllAccessDisabled":
		return set(ErrAccess, false)
	case "ExpiredToken", "InvalidAccessKeyId", "InvalidToken":
		return set(ErrExpiredCredentials, false)
	case "XAmzContentChecksumMismatch", "BadDigest", "InvalidDigest":
		return set(ErrCorrupt, true)
	case "PermanentRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "MovedPermanently":
		return set(ErrRegion, false)
	case "NotImplemented", "MethodNotAllowed":
		return set(ErrUnsupported, false)
	}
	switch {
	case status == 404:
		return set(ErrNotFound, false)
	case status == 412:
		return set(ErrPrecondition, false)
	case status == 416:
		return set(ErrRange, false)
	case status == 301:
		return set(ErrRegion, false)
	case status == 403 || status == 401:
		return set(ErrAccess, false)
	case status == 429:
		return set(ErrThrottled, true)
	case status == 501:
		return set(ErrUnsupported, false)
	case status < 300 || status >= 500 || // with no error's status the answer itself is broken
		strings.HasPrefix(code, "Internal"):
		return set(ErrUnavailable, true)
	}
	return set(ErrUnsupported, false)
}
