"""What plugs into the course from outside: models, rivals, benchmarks, measurements."""
