"""DICOM in: listener, landing, identity crosswalk, de-identification."""
