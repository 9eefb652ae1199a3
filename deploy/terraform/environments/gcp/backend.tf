# terraform init -backend-config=bucket=STATE_BUCKET
terraform {
  backend "gcs" {
    prefix = "neuroloop/gcp"
  }
}
