"""What is wrong with the data folder, for the metrics: each kind's count, 0 where all is well."""

from adapters.library import Library


def storage_faults(library: Library) -> dict[str, float]:
    """By kind. Every kind is always there, so that an alert on one has a series to look at."""
    return {
        "damaged": library.registry.damaged_count(),
        "unusable": len(library.unusable),  # files of the adapter folder
    }
