"""The artifact store: commit and read, on a disk or on S3, and leases. It knows no run."""
