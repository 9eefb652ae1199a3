variable "name" {
  description = "Begins the name of everything that is made, such as neuroloop."
  type        = string
  validation {
    condition     = can(regex("^[a-z][a-z0-9-]{2,20}$", var.name))
    error_message = "Lower-case letters, digits and hyphens, 3 to 21 of them, beginning with a letter."
  }
}

variable "bucket" {
  description = "Name of the object store's bucket; unique in all of AWS."
  type        = string
}

variable "network" {
  description = "Addresses of the VPC, a /16."
  type        = string
  default     = "10.20.0.0/16"
}

variable "zones" {
  description = "Availability zones, two at least: EKS and RDS want them."
  type        = list(string)
  validation {
    condition     = length(var.zones) >= 2
    error_message = "Name two zones at least."
  }
}

variable "admins" {
  description = "ARNs of the IAM principals that administer the cluster."
  type        = set(string)
  default     = []
}

variable "api_from" {
  description = "Addresses from which the cluster's API can be reached; empty: from inside the VPC only."
  type        = list(string)
  default     = []
}

variable "kubernetes" {
  description = "Version of Kubernetes."
  type        = string
  default     = "1.34"
}

variable "nodes" {
  description = "Ordinary nodes: type and how many of them."
  type        = object({ type = string, min = number, max = number })
  default     = { type = "m7i.xlarge", min = 2, max = 8 }
}

variable "gpu_nodes" {
  description = "Nodes with a GPU for training: type and at most how many; they come when a pod asks for one. 0: none."
  type        = object({ type = string, max = number })
  default     = { type = "g6.xlarge", max = 0 }
}

variable "database" {
  description = "PostgreSQL: instance class, gigabytes, and whether it has a standby in another zone."
  type        = object({ class = string, gigabytes = number, standby = bool })
  default     = { class = "db.m7g.large", gigabytes = 100, standby = true }
}

variable "protected" {
  description = "Whether database and bucket refuse to be destroyed."
  type        = bool
  default     = true
}

variable "backup_days" {
  description = "How many days a nightly backup is kept; erasures do not reach it."
  type        = number
  default     = 35
}
